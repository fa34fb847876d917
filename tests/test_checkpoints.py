"""In: files of weights as training programs write them. Out: proof which tensors are taken, and that it is said."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs.models.ordinary import notes_of
from hirelc_deploy.inputs.models.weights import load_weights, read_state_dict

State = dict[str, Tensor]


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def state(value: float) -> State:
    return {name: torch.full_like(tensor, value) for name, tensor in net().state_dict().items()}


def under(prefix: str, value: float) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state(value).items()}


def loaded(content: object, folder: Path, key: str | None = None) -> tuple[float, tuple[str, ...]]:
    """Return the value that all weights have, and what was said."""
    torch.save(content, folder / "w.pth")
    model = net()
    load_weights(model, folder / "w.pth", key=key)
    values = {float(parameter.detach().flatten()[0]) for parameter in model.parameters()}
    assert len(values) == 1
    return values.pop(), notes_of(model)


class Settings(dict[str, float]):
    """As configurations of training programs are kept."""


def ones(module: nn.Module) -> None:
    for value in module.state_dict(keep_vars=True).values():
        value.data.fill_(1)


AVERAGED: dict[str, object] = {
    "timm": {"state_dict": state(1), "state_dict_ema": state(2), "epoch": 3},
    "two words": {"model": state(1), "model_ema": state(2)},
    "ema first": {"ema": state(2), "model": state(1)},
    "stochastic weight averaging": {
        "net": state(1),
        "swa_model": {**under("module.", 2), "n_averaged": torch.tensor(5)},
    },
    "nested": {"checkpoint": {"raw": state(1), "ema": {"params": state(2)}}},
    "flat, by prefix": {**under("model.", 1), **under("ema_model.", 2)},
    "in camel case": {"model": state(1), "modelEMA": state(2)},
    "Polyak's": {"model": state(1), "model_polyak": state(2)},
    "with counters beside": {
        "state_dict": {**under("model.", 1), **under("model_ema.", 2), "model_ema.decay": torch.tensor(0.99)}
    },
    "by a callback of Lightning": {"state_dict": under("model.", 1), "callbacks": {"EMA": {"ema_weights": state(2)}}},
    "swapped, as MMEngine writes": {
        "state_dict": state(2),
        "ema_state_dict": {**under("module.", 1), "steps": torch.tensor(3)},
    },
}


@pytest.mark.parametrize("kind", AVERAGED)
def test_averaged_weights_are_taken_before_raw_ones_and_it_is_said(kind: str, tmp_path: Path) -> None:
    value, said = loaded(AVERAGED[kind], tmp_path)
    assert value == 2
    assert "the averaged weights, is taken; --weights-key chooses among" in said[0]


PARAMETERS = {name: torch.full_like(value, 2) for name, value in net().named_parameters()}
PARAMETERS_ALONE: dict[str, object] = {
    "by name": {"model": state(1), "ema": {"decay": 0.99, "shadow": PARAMETERS}},
    "flat": {**under("model.", 1), **{f"model_ema.{name}": value for name, value in PARAMETERS.items()}},
    "as torch_ema writes": {"net": state(1), "ema": {"shadow_params": list(PARAMETERS.values()), "num_updates": 3}},
}


@pytest.mark.parametrize("kind", PARAMETERS_ALONE)
def test_averaged_parameters_without_buffers_get_those_of_the_raw_weights(kind: str, tmp_path: Path) -> None:
    torch.save(PARAMETERS_ALONE[kind], tmp_path / "w.pth")
    model = net()
    load_weights(model, tmp_path / "w.pth")
    assert {float(value.detach().flatten()[0]) for value in model.parameters()} == {2}
    assert float(model.state_dict()["1.running_mean"][0]) == 1
    assert "the averaged weights, is taken" in notes_of(model)[0]
    assert "has parameters alone" in notes_of(model)[1]


LEFT_OUT: dict[str, object] = {
    "names without dots": {
        **under("model.", 1),
        **{f"model_ema.{name.replace('.', '')}": one for name, one in state(2).items()},
    },
    "buffers of mmcv": {**state(1), **{f"ema_{name.replace('.', '_')}": one for name, one in state(2).items()}},
    "of other classes": {"model": state(1), "ema": {**state(2), "3.weight": torch.ones(5, 4)}},
}


@pytest.mark.parametrize("kind", LEFT_OUT)
def test_averaged_weights_that_do_not_fit_are_not_left_out_without_a_word(kind: str, tmp_path: Path) -> None:
    value, said = loaded(LEFT_OUT[kind], tmp_path)
    assert value == 1
    assert "does not fit the model and is left out" in said[0]


def test_an_average_that_was_not_begun_is_none(tmp_path: Path) -> None:
    unbegun = {**under("module.", 2), "n_averaged": torch.tensor(0)}
    assert loaded({"model": state(1), "swa_model": unbegun}, tmp_path) == (1, ())


def test_lightning_keeps_the_average_where_the_weights_are(tmp_path: Path) -> None:
    content = {"state_dict": under("model.", 2), "current_model_state": under("model.", 1)}
    assert loaded({**content, "averaging_state": {"n_averaged": torch.tensor(3)}}, tmp_path)[0] == 2


def test_a_key_chooses(tmp_path: Path) -> None:
    both = {"state_dict": state(1), "state_dict_ema": state(2)}
    assert loaded(both, tmp_path, "state_dict") == (1, ())
    assert loaded(both, tmp_path, "state_dict_ema") == (2, ())
    assert loaded({**under("model.", 1), **under("ema_model.", 2)}, tmp_path, "model") == (1, ())
    assert loaded({"a": {"model": under("module.", 3)}}, tmp_path, "a.model") == (3, ())
    with pytest.raises(InputError, match=r"no weights of this model under --weights-key ema; give state_dict or state"):
        loaded(both, tmp_path, "ema")
    with pytest.raises(InputError, match="leave it out: the whole file is one state dict"):
        loaded(state(1), tmp_path, "ema")


WRAPPED: dict[str, object] = {
    "compiled and parallel": under("_orig_mod.module.", 1),
    "parallel and compiled": under("module._orig_mod.", 1),
    "a part compiled": {name.replace("0.", "0._orig_mod.", 1): tensor for name, tensor in state(1).items()},
    "of a training framework": {"state_dict": under("model.", 1), "epoch": 1, "global_step": 7},
    "framework around a parallel net": {"state_dict": under("net.module.", 1), "callbacks": {}},
    "beside a loss with weights": {"state_dict": {**under("backbone.", 1), "criterion.weight": torch.ones(4)}},
    "net": {"net": state(1), "acc": 94.1},
    "network and optimizer": {"network": state(1), "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}},
    "a key of its own": {"my_weights": state(1), "note": "good"},
    "with a counter beside": {**state(1), "epoch": 3},
    "of DeepSpeed": {"module": state(1), "ds_config": {}, "optimizer": None},
    "of another attribute": under("encoder.", 1),
    "with counters of operations": {**state(1), "total_ops": torch.zeros(1), "0.total_params": torch.zeros(1)},
    "with arguments": {"state_dict": state(1), "args": argparse.Namespace(lr=0.1), "folder": Path("runs")},
    "with a configuration": {"state_dict": state(1), "cfg": Settings(lr=0.1), "args": argparse.Namespace(lr=0.1)},
    "with numbers of numpy": {"model": state(1), "best": np.float64(0.9)},
    "arrays of numpy": {"model": {name: value.numpy() for name, value in state(1).items()}},
    "arrays in another order": {name: value.double().numpy().T.copy().T for name, value in state(1).items()},
    "a whole network": {"model": net().requires_grad_(False).apply(ones), "epoch": 3},
    "averaged alone": {**under("module.", 1), "n_averaged": torch.tensor(9)},
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_prefixes_and_keys_of_training_programs_are_found(kind: str, tmp_path: Path) -> None:
    assert loaded(WRAPPED[kind], tmp_path) == (1, ())


def test_prefixes_are_found_in_safetensors_too(tmp_path: Path) -> None:
    safetensors.torch.save_file({**under("model.", 1), **under("model_ema.", 2)}, tmp_path / "w.safetensors")
    model = net()
    load_weights(model, tmp_path / "w.safetensors")
    assert float(model[0].bias[0]) == 2
    assert "w.safetensors: model_ema" in notes_of(model)[0]


def test_two_that_are_equally_likely_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds several state dicts of this model: student, teacher; choose one with"):
        loaded({"student": state(1), "teacher": state(2)}, tmp_path)
    assert loaded({"student": state(1), "teacher": state(2)}, tmp_path, "teacher") == (2, ())


def test_of_several_state_dicts_the_one_of_this_model_is_taken(tmp_path: Path) -> None:
    other = {f"{name}": torch.ones(7) for name in state(1)}
    assert loaded({"discriminator": {"conv.weight": torch.ones(3)}, "generator": state(1)}, tmp_path) == (1, ())
    assert loaded({"larger": other, "smaller": state(1)}, tmp_path) == (1, ())


def test_a_name_that_only_sounds_averaged_is_raw(tmp_path: Path) -> None:
    value, said = loaded({"model": state(1), "schema": state(2)}, tmp_path)
    assert value == 1
    assert said == ("w.pth: model is taken; --weights-key chooses among model, schema",)


def test_a_file_read_without_a_model_gives_the_averaged_weights(tmp_path: Path) -> None:
    torch.save({"model": state(1), "model_ema": state(2)}, tmp_path / "w.pth")
    tensors, said = read_state_dict(tmp_path / "w.pth")
    assert float(tensors["0.bias"][0]) == 2
    assert "model_ema, the averaged weights" in said
    assert float(read_state_dict(tmp_path / "w.pth", "model")[0]["0.bias"][0]) == 1


class Wrapped(nn.Module):
    """A network of which the file knows nothing that its attribute is called `model`."""

    def __init__(self) -> None:
        super().__init__()
        self.model = net()


def test_a_part_that_all_names_of_the_model_begin_with_may_be_missing(tmp_path: Path) -> None:
    for number, content in enumerate((state(1), under("net.module.", 1))):
        torch.save(content, tmp_path / f"{number}.pth")
        model = Wrapped()
        load_weights(model, tmp_path / f"{number}.pth")
        assert {float(value.detach().flatten()[0]) for value in model.parameters()} == {1}


def test_the_contents_and_not_the_name_tell_the_kind_of_a_file(tmp_path: Path) -> None:
    for name in ("w.pth", "w.SAFETENSORS"):
        safetensors.torch.save_file(state(1), tmp_path / name)
        assert float(read_state_dict(tmp_path / name)[0]["0.bias"][0]) == 1
    for name in ("w.safetensors", "W.PTH"):
        torch.save(state(1), tmp_path / name)
        assert float(read_state_dict(tmp_path / name)[0]["0.bias"][0]) == 1


def test_scales_of_quantization_aware_training_are_left_out_and_it_is_said(tmp_path: Path) -> None:
    scales = {"0.weight_fake_quant.scale": torch.ones(1), "0.activation_post_process.min_val": torch.ones(1)}
    value, said = loaded({**state(1), **scales, "3.pre_ops.0.op.scale": torch.ones(4, 1)}, tmp_path)
    assert value == 1
    assert "scales of quantization-aware training (0.weight_fake_quant.scale, " in said[0]


def test_sparse_and_very_short_floats_are_weights_too(tmp_path: Path) -> None:
    short = {name: one.to(torch.float8_e4m3fn) if one.is_floating_point() else one for name, one in state(1).items()}
    assert loaded(short, tmp_path) == (1, ())
    assert loaded({**state(1), "3.weight": torch.ones(2, 4).to_sparse()}, tmp_path) == (1, ())


def optimizer() -> object:
    parameter = nn.Parameter(torch.ones(2))
    steps = torch.optim.Adam([parameter])
    parameter.sum().backward()
    steps.step()
    return steps.state_dict()


REFUSED: dict[str, tuple[object, str]] = {
    "optimizer": (optimizer(), "state of an optimizer and no weights"),
    "optimizer under a key": ({"optimizer": optimizer(), "epoch": 3}, "state of an optimizer and no weights"),
    "adapters": ({**state(1), "3.lora_A": torch.ones(2, 4)}, "adapters beside the weights .3.lora_A.; merge them"),
    "adapters in an entry": (
        {"model": state(1), "lora": {"3.lora_A": torch.ones(2, 4)}},
        "adapters beside the weights",
    ),
    "without values": ({name: one.to("meta") for name, one in state(1).items()}, "has no values"),
    "half missing": (
        {name: one for name, one in under("encoder.", 1).items() if ".1." not in name},
        r"lacks 1.weight \(4,\), 1.bias \(4,\), 1.running_mean \(4,\) and 1 more\.$",
    ),
    "an object in the weights' place": ({"0.weight": argparse.Namespace()}, r"refused, .*\(argparse.Namespace\)"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_holds_no_weights_says_what_it_holds(kind: str, tmp_path: Path) -> None:
    content, sentence = REFUSED[kind]
    with pytest.raises(InputError, match=sentence):
        loaded(content, tmp_path)


def test_files_that_stand_in_place_of_weights_are_called_by_their_name(tmp_path: Path) -> None:
    for text, said in (
        ("version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("<!doctype html>", "web page"),
    ):
        (tmp_path / "w.pth").write_text(text)
        with pytest.raises(InputError, match=said):
            load_weights(net(), tmp_path / "w.pth")


class Touching:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return open, (self.path, "w")


def test_what_a_file_names_beside_the_weights_is_never_run(tmp_path: Path) -> None:
    assert loaded({"model": state(1), "more": Touching(tmp_path / "ran")}, tmp_path) == (1, ())
    assert not (tmp_path / "ran").exists()

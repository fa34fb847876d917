"""In: files of weights as training programs write them. Out: proof which tensors are taken, and that it is said."""

from __future__ import annotations

from pathlib import Path

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
}


@pytest.mark.parametrize("kind", AVERAGED)
def test_averaged_weights_are_taken_before_raw_ones_and_it_is_said(kind: str, tmp_path: Path) -> None:
    value, said = loaded(AVERAGED[kind], tmp_path)
    assert value == 2
    assert "the averaged weights, is taken; --weights-key chooses among" in said[0]


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

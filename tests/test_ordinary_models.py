"""In: models as people hand them over. Out: proof that what is worked with is the same function, ordinary, and said."""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import NamedTuple

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm
from torch.nn.utils import weight_norm as hooked_weight_norm
from torch.utils.checkpoint import checkpoint

from hirelc_deploy import api
from hirelc_deploy.compress import recovery
from hirelc_deploy.compress.branches import proven
from hirelc_deploy.compress.slicing import slice_model
from hirelc_deploy.errors import InputError
from hirelc_deploy.graph.answers import named, selected
from hirelc_deploy.graph.units import build_graph
from hirelc_deploy.inputs.models import source as sources
from hirelc_deploy.inputs.models.checks import check_output
from hirelc_deploy.inputs.models.given import source_of
from hirelc_deploy.inputs.models.ordinary import notes_of
from hirelc_deploy.inputs.models.source import ModelSource
from hirelc_deploy.tasks.classification import CLASSIFICATION
from hirelc_deploy.tasks.registry import make_task


def net(*first: nn.Module, width: int = 8) -> nn.Sequential:
    """A net of (2, 3, 16, 16) images, behind layers of width channels."""
    return nn.Sequential(*first, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))


def plain_net() -> nn.Sequential:
    torch.manual_seed(0)
    return net(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))


def images(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


# Weights that the forward pass computes


class ScaledLinear(nn.Module):
    """No nn.Linear, but what one does with a scaled weight."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(outputs, inputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 0.3, self.bias)


class Standardised(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(input, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Merged(nn.Module):
    """Branches that only hold parameters: each pass merges them into one kernel, as a RepVGG does."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.wide = nn.Sequential(nn.Conv2d(inputs, outputs, 3, bias=False), nn.BatchNorm2d(outputs))
        self.narrow = nn.Conv2d(inputs, outputs, 1)
        nn.init.uniform_(self.wide[1].running_var, 0.5, 1.5)
        nn.init.uniform_(self.wide[1].running_mean)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.wide[1].weight / (self.wide[1].running_var + self.wide[1].eps).sqrt()
        weight = self.wide[0].weight * scale[:, None, None, None] + F.pad(self.narrow.weight, [1] * 4)
        return F.conv2d(x, weight, self.wide[1].bias - self.wide[1].running_mean * scale + self.narrow.bias)


class LowRank(nn.Module):
    """A linear layer with an adapter (LoRA) that is merged in each pass."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs)
        self.down, self.up = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.base.weight + self.up @ self.down, self.base.bias)


class RunsParts(LowRank):
    """Runs what it holds: a layer of two products."""

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.t() @ self.up.t()  # type: ignore[no-any-return]


class Conditional(nn.Conv2d):
    """Weights that depend on the input cannot be stored."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight * input.mean(), self.bias, self.stride, self.padding)


def masked(kind: Callable[..., nn.Module], name: str, *more: object) -> nn.Module:
    layer = nn.Conv2d(3, 8, 3)
    kind(layer, name, *more)
    return layer


COMPUTED: dict[str, Callable[[], nn.Module]] = {
    "mask": lambda: net(masked(prune.l1_unstructured, "weight", 0.5)),
    "masks of channels, twice": lambda: net(
        prune.l1_unstructured(masked(prune.ln_structured, "weight", 2, 1, 0), "weight", 3)
    ),
    "mask of a bias": lambda: net(masked(prune.random_unstructured, "bias", 0.5)),
    "weight norm as a hook": lambda: net(hooked_weight_norm(nn.Conv2d(3, 8, 3))),
    "spectral norm as a hook": lambda: net(spectral_norm(nn.Conv2d(3, 8, 3))),
    "weight norm, parametrized": lambda: net(parametrizations.weight_norm(nn.Conv2d(3, 8, 3))),
    "spectral norm, parametrized": lambda: net(parametrizations.spectral_norm(nn.Conv2d(3, 8, 3))),
    "orthogonal, of a linear layer": lambda: net(nn.Conv2d(3, 8, 3))[:-1].append(
        parametrizations.orthogonal(nn.Linear(8, 4))
    ),
    "standardised": lambda: net(Standardised(3, 8, 3, 2, 1)),
    "merged of parts": lambda: net(Merged(3, 8)),
    "low rank, merged": lambda: net(nn.Conv2d(3, 8, 3))[:-1].append(LowRank(8, 4)),
    "scaled, of a class of one's own": lambda: net(nn.Conv2d(3, 8, 3))[:-1].append(ScaledLinear(8, 4)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", COMPUTED)
def test_weights_that_are_computed_in_each_pass_are_stored_and_compute_the_same(kind: str) -> None:
    torch.manual_seed(0)
    model = COMPUTED[kind]().eval()
    with torch.no_grad():
        wanted = model(images())
    before = dict(model.state_dict())
    found = source_of(model).build()
    with torch.no_grad():
        torch.testing.assert_close(found(images()), wanted, rtol=1e-5, atol=1e-6)
    assert {name.rpartition(".")[2] for name in found.state_dict()} <= {"weight", "bias"}
    assert [type(layer) for layer in found.modules() if list(layer.parameters(recurse=False))] == [nn.Conv2d, nn.Linear]
    assert not any(layer._forward_pre_hooks for layer in found.modules())
    assert "stored now, with the same values" in notes_of(found)[0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "the caller's own stays"


@pytest.mark.parametrize("kind", ["StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame"])
def test_standardised_convolutions_of_timm_are_stored_those_that_pad_by_themselves_too(kind: str) -> None:
    torch.manual_seed(0)
    convolution = getattr(timm.layers, kind)
    model = net(convolution(3, 8, 3, stride=2), nn.BatchNorm2d(8), convolution(8, 8, 3)).eval()
    found = source_of(model).build()
    assert {type(layer).__name__ for layer in (found[0], found[2])} <= {"Conv2d", "Conv2dSame"}
    with torch.no_grad():
        torch.testing.assert_close(found(images()), model(images()), rtol=1e-5, atol=1e-6)


def test_a_layer_that_is_there_twice_is_stored_once_and_stays_shared() -> None:
    torch.manual_seed(0)
    shared = ScaledLinear(8, 8)
    model = net(nn.Conv2d(3, 8, 3))[:-1].extend([shared, nn.ReLU(), shared]).eval()
    found = source_of(model).build()
    assert type(found[-1]) is nn.Linear
    assert found[-1] is found[-3]
    with torch.no_grad():
        torch.testing.assert_close(found(images()), model(images()), rtol=1e-5, atol=1e-6)


def test_a_layer_whose_weights_depend_on_its_input_stays_as_it_is() -> None:
    found = source_of(net(Conditional(3, 8, 3))).build()
    assert type(found[0]) is Conditional
    assert notes_of(found) == ()


def test_a_layer_that_runs_the_layers_in_it_stays_as_it_is() -> None:
    found = source_of(net(nn.Conv2d(3, 8, 3))[:-1].append(RunsParts(8, 4))).build()
    assert type(found[-1]) is RunsParts
    assert notes_of(found) == ()
    assert not found[-1].base._forward_pre_hooks


def test_an_ordinary_model_is_not_touched_and_nothing_is_said() -> None:
    model = plain_net()
    found = source_of(model).build()
    assert found.state_dict().keys() == model.state_dict().keys()
    assert notes_of(found) == ()


# Wrappers, modes and settings


def with_part_compiled() -> nn.Module:
    model = plain_net()
    model[0] = torch.compile(model[0])
    return model


def with_forward_compiled() -> nn.Module:
    model = plain_net()
    model.forward = torch.compile(model.forward)  # type: ignore[method-assign]
    return model


def compiled_in_place() -> nn.Module:
    model = plain_net()
    model.compile()
    return model


@torch.inference_mode()
def in_inference_mode() -> nn.Module:
    return plain_net()


WRAPPED: dict[str, Callable[[], nn.Module]] = {
    "compiled": lambda: torch.compile(plain_net()),  # type: ignore[dict-item,return-value]
    "compiled in place": compiled_in_place,
    "compiled part": with_part_compiled,
    "compiled forward": with_forward_compiled,
    "parallel": lambda: nn.DataParallel(plain_net()),
    "parallel part": lambda: nn.Sequential(nn.DataParallel(plain_net()[:2]), *plain_net()[2:]),
    "averaged by timm": lambda: timm.utils.ModelEmaV2(plain_net()),
    "averaged": lambda: torch.optim.swa_utils.AveragedModel(plain_net()),
    "inference mode": in_inference_mode,
    "rewritten by fx": lambda: torch.fx.symbolic_trace(plain_net()),
    "half": lambda: plain_net().half(),
    "bfloat16": lambda: plain_net().bfloat16(),
    "double": lambda: plain_net().double(),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_what_is_around_a_model_is_taken_off(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sources.ModelSource,
        "_from_factory",
        lambda self: sources.with_plain_parts(sources.unwrapped(WRAPPED[kind](), "--model net.py:f")),
    )
    wanted = plain_net().eval()
    rounding = {"half": 2e-2, "bfloat16": 1e-1}.get(kind, 1e-5)
    for source in (source_of(WRAPPED[kind]()), source_of(WRAPPED[kind]), ModelSource("net.py:f")):
        found = source.load()
        assert {tensor.dtype for tensor in found.parameters()} == {torch.float32}
        assert not any(tensor.is_inference() for tensor in (*found.parameters(), *found.buffers()))
        with torch.no_grad():
            torch.testing.assert_close(found(images()), wanted(images()), rtol=rounding, atol=rounding)
        assert [unit.size for unit in build_graph(found, images()).units] == [8]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["scripted", "traced", "scripted part", "exported", "exported graph"])
def test_a_model_without_code_is_refused_in_one_sentence_at_once(kind: str, tmp_path: Path) -> None:
    model = plain_net().eval()
    given: object = {
        "scripted": lambda: torch.jit.script(model),
        "traced": lambda: torch.jit.trace(model, images()),
        "scripted part": lambda: nn.Sequential(torch.jit.script(model[:2]), *model[2:]),
        "exported": lambda: torch.export.export(model, (images(),)),
        "exported graph": lambda: torch.export.export(model, (images(),)).module(),
    }[kind]()
    for call in (lambda: api.inspect(given), lambda: api.inspect(lambda: given)):  # type: ignore[arg-type, return-value]
        with pytest.raises(InputError, match=r"no code that could be cut; give the torch.nn.Module") as caught:
            call()
        assert "\n" not in str(caught.value)


QUANTIZED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "dynamic": lambda net: torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8),
    "in training": lambda net: torch.ao.quantization.prepare_qat(net.train()),
    "observed": torch.ao.quantization.prepare,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_model_that_is_quantized_already_is_refused(kind: str) -> None:
    model = plain_net().eval()
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")  # type: ignore[assignment]
    with pytest.raises(InputError, match="quantized, or prepared for that; give the float network"):
        source_of(QUANTIZED[kind](model))


@pytest.mark.filterwarnings("ignore")
def test_a_network_that_is_ready_to_be_quantized_is_as_any_other() -> None:
    from torchvision.models.quantization import resnet18

    assert isinstance(source_of(resnet18(weights=None, quantize=False)).build(), nn.Module)


class OddTrain(nn.Sequential):
    """`way` is what its `train` does."""

    way = ""

    def train(self, mode: bool = True) -> OddTrain:
        if self.way == "raises" and mode:
            raise RuntimeError("for inference only")
        super().train(mode)
        if self.way == "freezes":
            self[0].requires_grad_(False)
        return None if self.way == "nothing" else self  # type: ignore[return-value]


def odd_train(way: str) -> nn.Module:
    model = OddTrain(*plain_net())
    model.way = way
    return model


def test_a_train_that_fails_or_returns_nothing_is_refused() -> None:
    with pytest.raises(InputError, match=r"train\(\) or eval\(\) fails .*for inference only"):
        source_of(odd_train("raises"))
    with pytest.raises(InputError, match=r"train\(\) or eval\(\) does not return it"):
        source_of(odd_train("nothing"))


# Functions that a network keeps


def forward_replaced() -> nn.Module:
    model = plain_net()
    old = model.forward
    model.forward = lambda x: old(x) * 2  # type: ignore[method-assign]
    return model


def forward_bound_late() -> nn.Module:
    model = plain_net()
    old = model[0].forward

    def new(layer: nn.Module, x: Tensor, times: float = 3.0) -> Tensor:
        return old(x) * times

    model[0].forward = MethodType(functools.partial(new), model[0])  # type: ignore[method-assign]
    return model


def default_of_a_lambda() -> nn.Module:
    model = plain_net()
    layer = model[0]
    layer.forward = lambda x, me=layer: nn.Conv2d.forward(me, x) + 1  # type: ignore[method-assign]
    return model


class Watched(nn.Module):
    """A hook, a closure, keeps what a layer made."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = plain_net()[:2], nn.Linear(8, 4)
        kept: dict[str, Tensor] = {}
        self.kept = kept
        self.body[0].register_forward_hook(lambda _layer, _given, made: kept.update(made=made))

    def forward(self, x: Tensor) -> Tensor:
        self.body(x)
        return self.out(self.kept["made"].relu().mean((2, 3)))  # type: ignore[no-any-return]


KEEPING: dict[str, Callable[[], nn.Module]] = {
    "forward replaced": forward_replaced,
    "a part's forward, bound": forward_bound_late,
    "default of a lambda": default_of_a_lambda,
    "hook": Watched,
}


@pytest.mark.parametrize("kind", KEEPING)
def test_a_copy_runs_its_own_layers_whatever_functions_the_model_keeps(kind: str) -> None:
    torch.manual_seed(0)
    model = KEEPING[kind]().eval()
    before = dict(vars(model))
    found = source_of(model).build()
    assert vars(model).get("forward") is before.get("forward"), "the caller's own stays"
    graph = proven(found, build_graph(found, images()), images())
    assert [unit.size for unit in graph.units] == [8]
    twin = copy.deepcopy(found)
    with torch.no_grad():
        wanted = model(images())
        for parameter in twin.parameters():
            parameter.zero_()
        assert float(twin(images()).abs().max()) == 0
        torch.testing.assert_close(found(images()), wanted)
        torch.testing.assert_close(model(images()), wanted)
    small = slice_model(found, graph, {graph.units[0].name: np.arange(3)})
    assert small(images()).shape == (2, 4)


class Outside(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts, self.out = list(parts), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return self.out(x)  # type: ignore[no-any-return]


def test_layers_that_are_no_part_of_the_model_are_refused_by_inspect_and_before_work() -> None:
    with pytest.raises(InputError, match=r"runs a Conv2d that is no part of it, .* an item of an nn.ModuleList"):
        api.inspect(Outside(plain_net()), input_size=(3, 16, 16))
    with pytest.raises(InputError, match="runs a Conv2d that is no part of it"):
        check_output(Outside(plain_net()).eval(), images(), CLASSIFICATION)


class Casting(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.net, self.way = plain_net(), way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "half":
            return self.net(x.half())  # type: ignore[no-any-return]
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(x).float()  # type: ignore[no-any-return]


@pytest.mark.parametrize(("way", "dtype"), [("half", "float16"), ("autocast", "bfloat16")])
def test_a_forward_pass_in_16_bits_is_refused_by_inspect_and_before_work(way: str, dtype: str) -> None:
    sentence = f"computes in {dtype} .*take autocast"
    with pytest.raises(InputError, match=sentence):
        api.inspect(Casting(way), input_size=(3, 16, 16))
    with pytest.raises(InputError, match=sentence):
        check_output(Casting(way).eval(), images(), CLASSIFICATION)


def test_checkpoints_that_give_no_slopes_on_demand_are_refused_in_one_sentence() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = plain_net()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.net, x, use_reentrant=True)  # type: ignore[no-any-return]

    with pytest.raises(InputError, match=r"no slopes of its weights.*use_reentrant=True"):
        check_output(Checkpointed().eval(), images(), CLASSIFICATION)


# Several outputs


class Fields(NamedTuple):
    features: Tensor
    logits: Tensor


def test_two_outputs_of_one_name_are_refused_and_none_is_dropped() -> None:
    with pytest.raises(InputError, match="two outputs that are called 'a_b'"):
        named({"a": {"b": torch.zeros(1)}, "a_b": torch.ones(1)})


def test_outputs_are_picked_by_their_names_wherever_they_stand() -> None:
    features, logits = torch.zeros(1), torch.ones(1)
    fields = Fields(features, logits)
    assert named(fields).keys() == {"features", "logits"}
    assert selected(fields, ["logits"])["logits"] is logits
    assert selected((features, logits), ["output_1"])["output_1"] is logits
    assert selected((features, logits), ["maps", "scores"])["scores"] is logits
    assert selected({"all": fields}, ["all_logits"])["all_logits"] is logits


def test_outputs_that_are_no_floats_may_stand_beside_others() -> None:
    class WithMask(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = plain_net()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            logits = self.net(x)
            return {"logits": logits, "mask": logits > 0, "class": logits.argmax(1)}

    assert check_output(WithMask().eval(), images(), make_task("none", (), {})).keys() == {"logits", "mask", "class"}


SWITCHES = """
import os
import warnings
import numpy
import torch
from torch import nn
os.chdir("/")
warnings.simplefilter("error")
numpy.seterr(all="raise")
torch.set_default_dtype(torch.float64)
torch.set_grad_enabled(False)

def make():
    torch.set_default_device("meta")
    torch.set_default_device("cpu")
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
"""


def test_a_model_file_that_switches_torch_globally_changes_nothing_for_others(tmp_path: Path) -> None:
    (tmp_path / "switching_net.py").write_text(SWITCHES)
    folder, filters, errors = Path.cwd(), list(warnings.filters), np.geterr()
    found = api.inspect(f"{tmp_path / 'switching_net.py'}:make", input_size=(3, 16, 16))
    assert (Path.cwd(), list(warnings.filters), np.geterr()) == (folder, filters, errors)
    assert [unit["size"] for unit in found.units] == [8]
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
    torch.set_default_device(None)
    sys.modules.pop("switching_net", None)


@pytest.mark.parametrize("switch", ["dtype", "gradients", "inference"])
def test_a_caller_who_switched_torch_globally_gets_the_same_answer(switch: str) -> None:
    model = plain_net()
    usual = api.inspect(model, input_size=(3, 16, 16)).record
    if switch == "dtype":
        torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(switch != "gradients")
    try:
        with torch.inference_mode(switch == "inference"):
            found = api.inspect(model, input_size=(3, 16, 16)).record
        assert torch.get_default_dtype() == (torch.float64 if switch == "dtype" else torch.float32)
        assert torch.is_grad_enabled() == (switch != "gradients")
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)
    assert found == usual


# Frozen parameters


def frozen(*names: str) -> nn.Module:
    model = plain_net()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(names))
    return model


@pytest.mark.parametrize(("names", "count"), [(("0.", "1."), 4), (("",), 6), (("1.weight",), 1), (("5.bias",), 1)])
def test_all_parameters_are_trained_and_it_is_said(names: tuple[str, ...], count: int) -> None:
    model = frozen(*names)
    found = source_of(model).build()
    assert all(parameter.requires_grad for parameter in found.parameters())
    assert notes_of(found) == (f"{count} of 6 parameters were frozen (requires_grad=False); recovery trains all",)
    assert not all(parameter.requires_grad for parameter in model.parameters()), "the caller's own stays frozen"


def test_a_constant_of_a_box_decoder_stays_frozen() -> None:
    class DFL(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 1, 1, bias=False).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)  # type: ignore[no-any-return]

    found = source_of(nn.Sequential(nn.Conv2d(3, 8, 1), DFL())).build()
    assert [parameter.requires_grad for parameter in found.parameters()] == [True, True, False]
    assert notes_of(found) == ()


def test_what_train_freezes_again_is_trained_all_the_same() -> None:
    student = source_of(odd_train("freezes")).build()
    assert "recovery trains all" in notes_of(student)[0]
    recovery._in_training(student, still_norms=False)
    assert all(parameter.requires_grad for parameter in student.parameters())


class TwoBranches(nn.Module):
    """One branch is frozen by no_grad, or by its own forward pass."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.frozen, self.trained, self.out = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "forward":
            self.frozen.requires_grad_(False)
        with torch.no_grad() if self.way == "no_grad" else contextlib.nullcontext():
            one = self.frozen(x)
        return self.out((one + self.trained(x)).relu().mean((2, 3)))  # type: ignore[no-any-return]


def test_layers_that_no_slope_reaches_are_named() -> None:
    model = source_of(TwoBranches("no_grad")).build()
    check_output(model, images(), CLASSIFICATION)
    assert [text.partition(" (")[0] for text in notes_of(model)] == ["no slope reaches the weights of frozen"]
    plain = source_of(TwoBranches("")).build()
    check_output(plain, images(), CLASSIFICATION)
    assert notes_of(plain) == ()


def test_a_forward_pass_that_freezes_weights_is_refused() -> None:
    model = source_of(TwoBranches("forward")).build()
    with pytest.raises(InputError, match=r"freezes frozen.weight and 1 more weights .* take that out"):
        check_output(model, images(), CLASSIFICATION)

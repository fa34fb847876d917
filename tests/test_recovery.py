import copy
import io
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hirelc_deploy.compress import recovery, row_file
from hirelc_deploy.compress.features import FeatureMatch, kept_inputs
from hirelc_deploy.compress.norms import correct_norms, reestimate_norms
from hirelc_deploy.compress.recovery import (
    Pause,
    Recovery,
    Teacher,
    compensate,
    distillation_loss,
    fine_tune,
    norms_stand_still,
)
from hirelc_deploy.compress.slicing import slice_model
from hirelc_deploy.errors import InputError
from hirelc_deploy.graph.answers import Answers
from hirelc_deploy.graph.sensitivity import input_grams
from hirelc_deploy.graph.units import build_graph
from hirelc_deploy.progress import Progress
from hirelc_deploy.tasks.classification import CLASSIFICATION, Classification

QUIET = Progress(quiet=True)
CPU = torch.device("cpu")


class Pictures:
    """Random 8x8 pictures; view v is picture i shifted by v columns."""

    decodes = False

    def __init__(self, count: int = 64) -> None:
        self.pixels = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        self.labels = (self.pixels.mean((1, 2, 3)) > 0.5).long().numpy()
        self.labelled = True

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(self, indices: np.ndarray) -> Tensor:
        return self.pixels[torch.as_tensor(indices)]

    def views(self, indices: np.ndarray, view: int) -> Tensor:
        return self.batch(indices).roll(view, 3)

    def targets(self, indices: np.ndarray, view: int | None = None) -> list[int]:
        return self.labels[indices].tolist()


class Noise(nn.Module):
    """Draws random numbers of its own while it is trained."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.2, self.training)


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2),
    ).eval()  # fmt: skip


def test_compensation_is_exact_when_the_lost_features_are_combinations_of_the_kept_ones():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 16, 1), nn.Conv2d(16, 4, 1), nn.Flatten()).eval()
    with torch.no_grad():  # outputs 8..15 of the first layer repeat 0..7, scaled and shifted
        model[0].weight[8:] = 2 * model[0].weight[:8]
        model[0].bias[8:] = 2 * model[0].bias[:8] + 1.5
    x = torch.randn(256, 6, 1, 1)
    graph = build_graph(model, x[:2])
    unit = graph.units[0]
    kept = {unit.name: np.arange(8)}
    grams = input_grams(model, graph, [x])
    plain = slice_model(model, graph, kept)(x)
    made_up = slice_model(compensate(model, graph, kept, grams), graph, kept)(x)
    scale = float(model(x).abs().max())
    assert float((made_up - model(x)).abs().max()) < 0.01 * scale
    assert float((plain - model(x)).abs().max()) > 0.2 * scale


def test_compensation_leaves_the_given_model_alone():
    model = small_net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    graph = build_graph(model, torch.rand(2, 3, 8, 8))
    kept = {graph.units[0].name: np.arange(8)}
    compensate(model, graph, kept, input_grams(model, graph, [torch.rand(8, 3, 8, 8)]))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_reestimated_norm_statistics_are_the_plain_averages_over_batches():
    norm = nn.BatchNorm1d(3)
    batches = [torch.randn(10, 3) + 5, torch.randn(10, 3) - 1]
    reestimate_norms(norm.eval(), batches)
    assert torch.allclose(norm.running_mean, torch.stack([b.mean(0) for b in batches]).mean(0), atol=1e-5)
    assert torch.allclose(norm.running_var, torch.stack([b.var(0) for b in batches]).mean(0), atol=1e-5)
    assert norm.momentum == 0.1
    assert not norm.training


def test_norms_of_an_uncut_model_are_not_moved_by_correcting_them():
    model = small_net()
    with torch.no_grad():
        model[1].running_mean.uniform_(-1, 1)
        model[1].running_var.uniform_(0.5, 2)
    before = model[1].running_mean.clone(), model[1].running_var.clone()
    batches = [torch.rand(8, 3, 8, 8)]
    restated = small_net()
    reestimate_norms(restated, batches)
    correct_norms(model, restated, batches)
    assert torch.allclose(model[1].running_mean, before[0], atol=1e-6)
    assert torch.allclose(model[1].running_var, before[1], rtol=1e-5)


def test_norms_are_corrected_by_what_the_cut_moved():
    norm, uncut = nn.BatchNorm1d(1).eval(), nn.BatchNorm1d(1).eval()
    with torch.no_grad():
        norm.running_mean.fill_(10.0)
        norm.running_var.fill_(3.0)
    batch = torch.randn(64, 1)
    reestimate_norms(uncut, [batch])
    correct_norms(norm, uncut, [2 * batch + 1])  # the cut doubled the features and added one
    by_hand = 10 + (2 * batch.mean() + 1) - batch.mean()
    assert norm.running_mean.item() == pytest.approx(by_hand.item(), abs=1e-4)
    assert norm.running_var.item() == pytest.approx(3.0 * 4, rel=1e-4)


def test_distillation_loss_is_zero_soft_term_for_the_teachers_own_answers():
    answers = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    labels = torch.tensor([0, 1])
    told = {"output": answers}
    found = distillation_loss(CLASSIFICATION, told, told, labels, Recovery(soft_weight=0.7))
    by_hand = 0.3 * (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-1))) / 2
    assert found.item() == pytest.approx(by_hand, abs=1e-6)


def test_distillation_loss_scales_the_soft_term_by_the_squared_temperature():
    logits, answers = torch.tensor([[0.0, 0.0]]), torch.tensor([[4.0, 0.0]])
    p = torch.softmax(answers / 2, 1)
    by_hand = 4 * float((p * (p.log() - math.log(0.5))).sum())
    found = distillation_loss(CLASSIFICATION, {"output": logits}, {"output": answers}, None, Recovery())
    assert found.item() == pytest.approx(by_hand, abs=1e-5)


def test_the_teacher_answers_each_picture_once():
    pictures = Pictures()
    teacher = Teacher(small_net(), pictures, 2, CPU)
    calls = []
    teacher.model.register_forward_hook(lambda *_: calls.append(1))
    rows = np.arange(8)
    first = teacher.answers(rows, 1, pictures.views(rows, 1))
    again = teacher.answers(rows, 1, pictures.views(rows, 1))
    other = teacher.answers(rows, 0, pictures.views(rows, 0))
    assert len(calls) == 2
    assert torch.equal(first["output"], again["output"])
    assert not torch.equal(first["output"], other["output"])


def test_a_training_is_the_same_whether_the_teachers_answers_were_kept_or_it_was_asked_again(monkeypatch):
    def trained() -> dict[str, Tensor]:
        recipe = Recovery(epochs=4, batch_size=16, feature_weight=0.0)
        teacher = Teacher(small_net(), Pictures(), 2, CPU)
        return fine_tune(small_net(), teacher, recipe, seed=1, progress=QUIET).state_dict()

    kept = trained()
    monkeypatch.setattr(row_file, "SHARE_OF_DISK", 0.0)
    for name, values in trained().items():
        assert torch.equal(values, kept[name])


@pytest.mark.parametrize(("weight", "views"), [(0.0, {0, 1}), (300.0, {0, 1, 2, 3})])
def test_every_epoch_has_pictures_of_its_own_unless_the_teachers_answers_are_kept(weight, views):
    seen = set()

    class Watched(Pictures):
        def views(self, indices: np.ndarray, view: int) -> Tensor:
            seen.add(view)
            return super().views(indices, view)

    teacher = Teacher(small_net(), Watched(), 2, CPU)
    recipe = Recovery(epochs=4, batch_size=16, feature_weight=weight)
    fine_tune(small_net(), teacher, recipe, seed=1, progress=QUIET, reads={"3": np.arange(16)})
    assert seen == views


def test_fine_tuning_brings_the_student_nearer_to_its_teacher_and_repeats_exactly():
    pictures, uncut = Pictures(), small_net()
    x = pictures.batch(np.arange(64))

    def student() -> nn.Module:
        torch.manual_seed(3)
        net = small_net()
        with torch.no_grad():
            net[3].weight.normal_(0, 0.1)
        return net

    def distance(net: nn.Module) -> float:
        with torch.no_grad():
            return float(F.kl_div(net(x).log_softmax(1), uncut(x).softmax(1), reduction="batchmean"))

    def trained() -> nn.Module:
        recipe = Recovery(epochs=6, batch_size=16, learning_rate=0.1, soft_weight=1.0)
        return fine_tune(student(), Teacher(uncut, pictures, 2, CPU), recipe, seed=1, progress=QUIET)

    first, second = trained(), trained()
    assert distance(first) < 0.5 * distance(student())
    assert not first.training
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(("norm", "factor"), [(True, 4.0), (False, 2.0)])
def test_the_learning_rate_grows_with_a_batch_that_is_asked_for(norm: bool, factor: float) -> None:
    pictures, seen = Pictures(), []
    for asked in (None, 32):
        model = small_net() if norm else nn.Sequential(nn.Flatten(), nn.LazyLinear(4))
        model(pictures.batch(np.arange(2)))
        recipe, rates = Recovery(epochs=20, batch_size=8, asked_batch=asked), []
        fine_tune(
            model,
            Teacher(model, pictures, 2, CPU),
            recipe,
            seed=1,
            progress=QUIET,
            watch=lambda step, values, rates=rates: rates.append((step, values["learning rate"])),
        )
        seen.append(dict(rates))
    assert len(seen[0]) == 4 * len(seen[1])
    assert seen[1][20] == pytest.approx(factor * seen[0][80])


@pytest.mark.parametrize("weights_ema", [0.0, 0.9])
def test_a_training_that_was_interrupted_ends_as_an_undisturbed_one(weights_ema: float):
    class InterruptedError(Exception):
        pass

    pictures, uncut = Pictures(), small_net()
    recipe = Recovery(epochs=3.5, batch_size=16, learning_rate=0.1, weights_ema=weights_ema)
    kept = np.arange(16)

    def train(begun: bytes, stop_at: int) -> tuple[nn.Module | None, list[int], bytes]:
        torch.manual_seed(3)
        student, epochs, left = nn.Sequential(*small_net(), Noise()), list[int](), begun

        def after_epoch(epoch: int, student: nn.Module, standing: bytes) -> None:
            nonlocal left
            assert not student.training
            epochs.append(epoch)
            left = standing
            if epoch == stop_at:
                raise InterruptedError

        teacher = Teacher(uncut, pictures, 2, CPU)
        try:
            return (
                fine_tune(
                    student,
                    teacher,
                    recipe,
                    seed=1,
                    progress=QUIET,
                    reads={"3": kept},
                    begun=begun,
                    after_epoch=after_epoch,
                ),
                epochs,
                left,
            )
        except InterruptedError:
            return None, epochs, left

    whole, epochs, _ = train(b"", 99)
    assert epochs == [1, 2, 3]
    nothing, _, left = train(b"", 2)
    assert nothing is None
    resumed, rest, _ = train(left, 99)
    assert rest == [3]
    assert whole is not None
    assert resumed is not None
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("weights_ema", [0.0, 0.9])
def test_a_training_that_paused_ends_as_an_undisturbed_one(weights_ema: float):
    pictures, uncut = Pictures(), small_net()
    recipe = Recovery(epochs=3.5, batch_size=16, learning_rate=0.1, weights_ema=weights_ema)
    standing = b""

    def keep(left: bytes) -> None:
        nonlocal standing
        standing = left

    def train(pause: Pause | None) -> nn.Module:
        torch.manual_seed(3)
        student, teacher = nn.Sequential(*small_net(), Noise()), Teacher(uncut, pictures, 2, CPU)
        return fine_tune(
            student, teacher, recipe, seed=1, progress=QUIET, reads={"3": np.arange(16)}, begun=standing, pause=pause
        )

    whole = train(None).state_dict()
    early, later = (train(Pause(share, keep)).state_dict() for share in (0.2, 0.6))
    assert not torch.equal(early["0.weight"], later["0.weight"])
    again = train(Pause(0.6, keep)).state_dict()  # of what is done already nothing is done again
    assert all(torch.equal(a, b) for a, b in zip(later.values(), again.values(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(whole.values(), train(None).state_dict().values(), strict=True))


def test_drop_out_stays_off_while_a_student_is_trained_and_running_statistics_do_not():
    pictures, uncut = Pictures(), small_net()

    def trained(*behind: nn.Module) -> nn.Module:
        student = nn.Sequential(*small_net(), *behind)
        with torch.no_grad():
            student[7].weight.mul_(-90)  # far from the uncut model, or norms would stand still
        recipe = Recovery(epochs=2.5, batch_size=16)
        return fine_tune(student, Teacher(uncut, pictures, 2, CPU), recipe, seed=1, progress=QUIET)

    plain, with_drop_out = trained(), trained(nn.Dropout(0.9))
    assert all(
        torch.equal(a, b) for a, b in zip(plain.state_dict().values(), with_drop_out.state_dict().values(), strict=True)
    )
    assert not torch.equal(plain.state_dict()["1.running_mean"], small_net().state_dict()["1.running_mean"])


def test_norms_stand_still_where_batches_move_the_uncut_model_further_than_the_cut_did():
    pictures, uncut = Pictures(), small_net()
    with torch.no_grad():
        uncut[1].running_mean.add_(3.0)  # of other pictures than these
    near, far = copy.deepcopy(uncut), copy.deepcopy(uncut)
    with torch.no_grad():
        near[7].weight.mul_(0.99)
        far[7].weight.mul_(-90)
    recipe = Recovery(epochs=1, batch_size=16)
    before = uncut[1].running_mean.clone()
    for student, still in ((near, True), (far, False)):
        teacher = Teacher(uncut, pictures, 2, CPU)
        assert norms_stand_still(student, teacher, 16) is still
        assert torch.equal(teacher.model[1].running_mean, before)
        trained = fine_tune(student, teacher, recipe, seed=1, progress=QUIET)
        assert torch.equal(trained[1].running_mean, before) is still


def test_features_are_not_matched_where_answers_say_much_at_many_places():
    pictures = Pictures()
    torch.manual_seed(0)
    uncut = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 1))
    seen = {}

    class Maps(Classification):
        def divergence(self, wanted: Answers, found: Answers, temperature: float = 1.0) -> Tensor:
            return (wanted["output"] - found["output"]).square().flatten(1).mean(1)

    for weight in (0.0, 300.0):
        student = copy.deepcopy(uncut)
        with torch.no_grad():
            student[0].weight.mul_(0.5)
        pictures.labelled = False
        teacher = Teacher(uncut, pictures, 2, CPU, Maps((), {}))
        assert teacher.dense  # 16 numbers at each of 64 places
        recipe = Recovery(epochs=1, batch_size=16, soft_weight=1.0, feature_weight=weight)
        reads = {"2": np.arange(8)}
        seen[weight] = fine_tune(student, teacher, recipe, seed=1, progress=QUIET, reads=reads).state_dict()
    assert all(torch.equal(seen[0.0][key], seen[300.0][key]) for key in seen[0.0])
    assert not Teacher(small_net(), pictures, 2, CPU).dense


def test_kept_inputs_are_the_positions_that_stay_in_what_a_reader_reads():
    model = small_net()
    graph = build_graph(model, torch.rand(2, 3, 8, 8))
    kept = {graph.units[0].name: np.array([0, 1, 2, 3, 8, 9, 10, 11])}
    found = kept_inputs(graph, kept)
    assert found["3"].tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert found["7"].tolist() == list(range(16))


def test_feature_match_is_zero_for_a_copy_and_the_relative_error_for_a_scaled_twin():
    teacher = nn.Sequential(nn.Identity(), nn.Conv2d(4, 2, 1))
    student = nn.Sequential(nn.Identity(), nn.Conv2d(4, 2, 1))
    match = FeatureMatch(student, teacher, {"1": np.arange(4)})
    x = torch.randn(8, 4, 6, 6)
    teacher(x), student(x)
    assert match.distance().item() == 0
    student(1.5 * x)
    by_hand = (0.5 * x).square().mean() / (x.var() + 1e-6)
    assert match.distance().item() == pytest.approx(by_hand.item(), rel=1e-5)
    match.close()
    student(3 * x)
    assert match.distance().item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_feature_match_compares_large_maps_as_means_over_squares():
    teacher = nn.Sequential(nn.Identity(), nn.Conv2d(2, 2, 1))
    student = nn.Sequential(nn.Identity(), nn.Conv2d(2, 2, 1))
    match = FeatureMatch(student, teacher, {"1": np.arange(2)})
    x = torch.randn(4, 2, 8, 8)
    shuffled = x.reshape(4, 2, 4, 2, 4, 2).flip(3, 5).reshape(4, 2, 8, 8)  # every square keeps its mean
    teacher(x), student(shuffled)
    assert match.distance().item() < 1e-10


def test_feature_match_compares_only_the_features_that_were_kept():
    teacher, student = nn.Sequential(nn.Linear(4, 2)), nn.Sequential(nn.Linear(2, 2))
    match = FeatureMatch(student, teacher, {"0": np.array([1, 3])})
    x = torch.randn(8, 4)
    teacher(x), student(x[:, [1, 3]])
    assert match.watches
    assert match.distance().item() == 0


def test_feature_match_knows_the_features_of_channels_last_by_the_layer_that_reads_them():
    """As in ConvNeXt and Swin: (images, height, width, features) into a linear layer."""
    teacher, student = nn.Sequential(nn.Linear(16, 2)), nn.Sequential(nn.Linear(8, 2))
    match = FeatureMatch(student, teacher, {"0": np.arange(0, 16, 2)})
    x = torch.randn(4, 8, 8, 16)
    teacher(x), student(1.5 * x[..., ::2])
    by_hand = (0.5 * x[..., ::2]).square().mean() / (x[..., ::2].var() + 1e-6)
    assert match.distance().item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_feature_match_leaves_out_a_layer_whose_rows_are_cut_too():
    """As in MLP-Mixer: (images, channels, tokens) into a linear layer over tokens; channels and hidden tokens go."""
    teacher, student = nn.Sequential(nn.Linear(6, 2)), nn.Sequential(nn.Linear(3, 2))
    match = FeatureMatch(student, teacher, {"0": np.arange(3)})
    x = torch.randn(4, 8, 6)
    teacher(x), student(x[:, :4, :3])
    assert match.distance().item() == 0


def test_a_network_of_layers_of_one_and_three_dims_is_fine_tuned():
    class Volumes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.volume, self.norm = nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4)
            self.line, self.out = nn.Conv1d(4, 4, 3), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.line(self.norm(self.volume(x[:, None])).relu().flatten(2)).mean(2))

    torch.manual_seed(0)
    model = Volumes().eval()
    result = fine_tune(
        copy.deepcopy(model), Teacher(model, Pictures(8), 1, CPU), Recovery(batch_size=4), seed=0, progress=QUIET
    )
    changed = [not torch.equal(a, b) for a, b in zip(result.parameters(), model.parameters(), strict=True)]
    assert all(changed)


def test_fine_tuning_on_one_image_is_refused_with_a_sentence():
    with pytest.raises(InputError, match="1 images"):
        fine_tune(small_net(), Teacher(small_net(), Pictures(1), 1, CPU), Recovery(), seed=0, progress=QUIET)


def test_a_transformer_without_batch_norm_gets_adamw():
    net = nn.Sequential(nn.Flatten(), nn.LayerNorm(192), nn.Linear(192, 2))
    assert isinstance(recovery._optimizer(net, Recovery()), torch.optim.AdamW)
    assert isinstance(recovery._optimizer(small_net(), Recovery()), torch.optim.SGD)


def test_progress_prints_lines_with_the_time_left_where_there_is_no_terminal():
    moments = iter(range(0, 1000, 10))
    stream = io.StringIO()
    progress = Progress(stream, line_seconds=15, clock=lambda: next(moments))
    list(progress.track(range(6), "work"))
    lines = stream.getvalue().splitlines()
    assert lines
    assert all(line.startswith("work: ") and "s left" in line for line in lines)


def test_progress_adds_up_the_seconds_of_a_stage_that_fails():
    moments = itertools.chain([0.0], itertools.repeat(5.0))
    progress = Progress(quiet=True, clock=lambda: next(moments))
    with pytest.raises(ValueError, match="no"), progress.stage("step"):
        raise ValueError("no")
    assert progress.seconds == {"step": 5.0}

"""Points in the plane and tables of numbers: the data, and their pictures."""

from __future__ import annotations

import math
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from gankern.data import NAMES, Batches, Dataset, Table, load
from gankern.data.toys import COUNT, MIXTURES, TOYS
from gankern.training import pictures
from gankern.training.plane import COARSE, HEIGHT, LEFT, SIDE, TOP, WIDTH, Plane, ask
from gankern.training.views import Columns, Grid, view_of


def says(kind: type[Exception], sentence: str) -> Any:
    return pytest.raises(kind, match="^" + re.escape(sentence) + "$")


# --- the plane


def test_a_ring_has_eight_modes_and_not_seven_by_linspace_with_its_endpoint() -> None:
    """A well-known notebook has the angles linspace(0, 2 pi, 8): one mode is counted twice, and 7 are distinct."""
    for name in ("ring", "unrolled-ring", "8gaussians"):
        centres, _ = MIXTURES[name]
        assert len(centres) == 8
        apart = torch.cdist(centres, centres) + 9.0 * torch.eye(8)
        side = 2 * centres[0].norm().item() * math.sin(math.pi / 8)
        assert torch.allclose(apart.min(1).values, torch.full((8,), side), atol=1e-6)
        nearest = torch.cdist(load(name).samples, centres).argmin(1)
        assert torch.bincount(nearest, minlength=8).tolist() == [COUNT // 8] * 8


@pytest.mark.parametrize(
    ("name", "farthest", "std"),
    [
        ("ring", 1.0, 0.01),
        ("grid", 4 * math.sqrt(2), 0.05),
        ("unrolled-ring", 2.0, 0.02),
        ("8gaussians", 2 / 1.414, 0.02 / 1.414),
        ("25gaussians", 4 * math.sqrt(2) / 2.828, 0.05 / 2.828),
    ],
)
def test_mixtures_are_those_of_the_papers(name: str, farthest: float, std: float) -> None:
    data = load(name)
    assert data.mixture is not None
    centres, declared = data.mixture
    assert (data.samples.dtype, data.shape, len(data), data.name) == (torch.float32, (2,), COUNT, name)
    assert centres.norm(dim=1).max().item() == pytest.approx(farthest, rel=1e-6)
    assert len(centres.unique(dim=0)) == len(centres) == (25 if "25" in name or name == "grid" else 8)
    assert centres.mean(0).abs().max() < 1e-6
    noise = data.samples - centres[torch.cdist(data.samples, centres).argmin(1)]
    assert declared == pytest.approx(std)
    assert noise.std(0).tolist() == pytest.approx([std, std], rel=0.01)  # their own s.d. is 0.0022 of it
    assert noise.mean(0).abs().max() < 5 * std / math.sqrt(COUNT)


def test_swiss_roll_is_that_of_wgan_gp() -> None:
    """Along the spiral of radius t at angle t the parameter is uniform, across it the noise has s.d. 0.25."""
    points = 7.5 * load("swissroll").samples.double()
    turn = torch.atan2(points[:, 1], points[:, 0])
    laps = ((points.norm(dim=1) - turn) / (2 * math.pi)).round()
    t = turn + 2 * math.pi * laps  # the point of the spiral at the same angle
    across = points.norm(dim=1) - t
    assert across.std().item() == pytest.approx(0.25, rel=0.05)
    assert t.mean().item() == pytest.approx(3 * math.pi, rel=0.01)
    assert t.std().item() == pytest.approx(3 * math.pi / math.sqrt(12), rel=0.01)
    assert 1.5 * math.pi - 0.3 < t.min() < t.max() < 4.5 * math.pi + 0.3


@pytest.mark.parametrize("name", TOYS)
def test_points_follow_from_the_seed(name: str) -> None:
    first = load(name, seed=3).samples
    torch.manual_seed(1)
    torch.set_default_dtype(torch.float64)
    try:
        again = load(name, seed=3).samples
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(again, first)
    assert torch.equal(load(name, seed=3, limit=100).samples, first[:100])
    for other in (load(name, seed=4), load(name, seed=3, split="test"), load(name, seed=2, split="test")):
        assert not torch.equal(other.samples, first)


def test_batches_of_points_are_the_points() -> None:
    data, batches = load("grid", limit=600), []
    for batch in Batches(data, 200, seed=1):
        batches.append(batch)
        if len(batches) == 3:
            break
    assert batches[0].shape == (200, 2)
    assert torch.equal(torch.cat(batches).unique(dim=0), data.samples.unique(dim=0))


@pytest.mark.parametrize("option", ["size", "channels"])
def test_options_of_images_are_refused_for_points(option: str) -> None:
    with says(ValueError, f"data: {option} must be left out for samples that are no images, got 3"):
        load("ring", **{option: 3})  # type: ignore[arg-type]


def test_names_are_no_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ring").mkdir()
    assert set(TOYS) < set(NAMES)
    assert len(load("ring")) == COUNT
    with pytest.raises(ValueError, match="must hold pictures"):
        load("./ring")


# --- tables


def people(rows: int = 500) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(0)
    return np.stack([rng.normal(40, 12, rows), np.exp(rng.normal(10, 1, rows)), np.full(rows, 7.0), rng.integers(0, 5, rows)], 1)


@pytest.mark.parametrize("kind", ["npy", "npz", "csv", "plain.csv"])
def test_tables_are_standardised_and_restored(tmp_path: Path, kind: str) -> None:
    values, path = people(), tmp_path / f"people.{kind}"
    names = ("age", "income, net", "seven", "children")
    if kind == "npy":
        np.save(path, values)
    elif kind == "npz":
        np.savez(path, x_train=values, y_train=np.arange(500) % 3)
    else:
        with path.open("w", encoding="utf-8-sig" if kind == "csv" else "utf-8") as file:
            file.write('age,"income, net",seven,children\n\n' if kind == "csv" else "")
            np.savetxt(file, values, delimiter=", ", fmt="%.17g")
    data = load(path)
    assert data.table is not None
    assert data.table.columns == (names if kind == "csv" else ("x1", "x2", "x3", "x4"))
    assert (data.shape, data.samples.dtype, data.kind) == ((4,), torch.float32, "samples")
    assert data.samples.mean(0).abs().max() < 1e-5
    assert torch.allclose(data.samples.std(0, correction=0), torch.tensor([1.0, 1.0, 0.0, 1.0]), atol=1e-5)
    np.testing.assert_allclose(data.table.restore(data.samples).numpy(), values, rtol=1e-5, atol=1e-5)
    assert (data.labels is None) == (kind != "npz")
    few = load(path, limit=100)
    assert few.table is not None
    np.testing.assert_allclose(few.table.mean, values[:100].mean(0))
    assert len(few) == 100


def test_whole_numbers_are_a_table_unless_they_are_bytes(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[1, 5], [3, 5]], np.int64))
    assert load(tmp_path / "a.npy").samples.tolist() == [[-1.0, 0.0], [1.0, 0.0]]
    with says(ValueError, "data: split must be train for a table, got test"):
        np.savez(tmp_path / "a.npz", x_test=np.zeros((3, 2)))
        load(tmp_path / "a.npz", split="test")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a,b\n1,2\n3,red\n", "column b must hold numbers, got 'red' in line 3 of {path}"),
        ("1,2\n3,\n", "column x2 must hold numbers, got '' in line 2 of {path}"),
        ("a,b\n1,2\n3,nan\n", "column b must hold finite numbers, got nan in {path}"),
        ("a,b\n-inf,2\n3,4\n", "column a must hold finite numbers, got -inf in {path}"),
        ("a,b\n1,2\n\n3\n", "table must have 2 entries in each line, got 1 in line 4 of {path}"),
        ("a,b\n", "table must have at least one row and one column, got shape [0, 2] in {path}"),
        ("", "table must have at least one row and one column, got shape [0, 0] in {path}"),
    ],
)
def test_csv_refusals(text: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text)
    with says(ValueError, "data: " + sentence.format(path=path)):
        load(path)


def test_more_table_refusals(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"a,b\n1,\xff\n")
    with pytest.raises(ValueError, match=r"^data: source must be a CSV file in UTF-8, got .*invalid start byte"):
        load(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text("1,2\n")
    with says(ValueError, "data: split must be train for a source that has no test part, got test"):
        load(tmp_path / "b.csv", split="test")
    values = people(5)
    values[3, 1] = np.nan
    np.save(tmp_path / "a.npy", values)
    with says(ValueError, f"data: column x2 must hold finite numbers, got nan in {tmp_path / 'a.npy'}"):
        load(tmp_path / "a.npy")


def test_restoring_is_in_double_precision() -> None:
    big = Table(("time",), (1.7e9,), (1e3,))
    assert big.restore(torch.tensor([[0.001]])).item() == pytest.approx(1.7e9 + 1, abs=1e-3)


# --- pictures


class Bowl(nn.Module):
    """C(x) = -w |x - (1, 0)|^2, of each point, or of the mean of each pack; in training mode something else."""

    def __init__(self, pack: int = 1) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(3.0))
        self.pack = pack

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        return -self.w * (x.unflatten(0, (-1, self.pack)).mean(1) - torch.tensor([1.0, 0.0])).square().sum(1)


def test_surface_and_its_gradient() -> None:
    points, critic = torch.randn(50, 2), Bowl()
    with torch.no_grad():
        surface = ask(critic, points, torch.zeros(0, 2))
    assert surface is not None
    offset = points - torch.tensor([1.0, 0.0])
    torch.testing.assert_close(surface.score, -3 * offset.square().sum(1))
    torch.testing.assert_close(surface.gradient, -6 * offset)
    assert critic.training
    assert critic.w.grad is None
    assert not points.requires_grad


def test_surface_of_a_critic_of_packs_is_the_mean_over_packs_of_other_points() -> None:
    """C of (x + o) / 2 for each of eight others o."""
    points, others = torch.randn(20, 2), torch.randn(30, 2)
    surface = ask(Bowl(2), points, others)
    assert surface is not None
    offset = (points[:, None] + others[None, :8]) / 2 - torch.tensor([1.0, 0.0])
    torch.testing.assert_close(surface.score, -3 * offset.square().sum(2).mean(1))
    torch.testing.assert_close(surface.gradient, -3 * offset.mean(1))
    assert ask(Bowl(5), points, others) is None


@pytest.mark.parametrize("outputs", ["three a point", "a pair", "not finite", "mixed"])
def test_critics_without_a_surface(outputs: str) -> None:
    class Other(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            if outputs == "three a point":
                return y
            if outputs == "mixed":  # as minibatch features are
                return y[:, 0] - x.mean()
            return (y[:, 0], y) if outputs == "a pair" else y[:, 0] / 0.0

    assert ask(Other(2, 3), torch.randn(6, 2), torch.zeros(0, 2)) is None


def test_score_of_an_auto_encoder_is_minus_its_error() -> None:
    points, critic = torch.randn(6, 2), nn.Linear(2, 2)
    surface = ask(critic, points, torch.zeros(0, 2))
    assert surface is not None
    torch.testing.assert_close(surface.score, -(critic(points) - points).square().mean(1).detach())


def pixel(plane: Plane, x: float, y: float) -> tuple[int, int]:
    """(row, column) of a point of the plane in its pictures."""
    share = (torch.tensor([x, y]) - plane.low) / (plane.high - plane.low)
    return int(TOP + SIDE * (1 - share[1])), int(LEFT + SIDE * share[0])


def near(picture: Tensor, at: tuple[int, int], colour: str) -> bool:
    """Whether a pixel beside the place has nearly that colour."""
    row, column = at
    want = torch.tensor(list(bytes.fromhex(colour[1:])))
    return bool(((picture[row - 3 : row + 4, column - 3 : column + 4].int() - want).abs().amax(2) < 70).any())


def test_plane_shows_data_samples_and_the_critic_where_they_are() -> None:
    data = load("ring")
    plane = Plane(data)
    assert data.mixture is not None
    samples = torch.tensor([[0.3, 0.2]]).repeat(50, 1)
    reals, fakes, both = plane.reals(), plane.fakes(samples, 7), plane.fakes(samples, 7, Bowl().eval())
    assert all(p.shape == (HEIGHT, WIDTH, 3) and p.dtype == torch.uint8 for p in (reals, fakes, both))
    for x, y in data.mixture.centres.tolist():
        assert all(near(p, pixel(plane, x, y), pictures.DATA) for p in (reals, fakes, both))
    for picture, shown in ((reals, False), (fakes, True), (both, True)):
        assert near(picture, pixel(plane, 0.3, 0.2), pictures.FAKE) == shown
        assert not near(picture, pixel(plane, -0.3, 0.2), pictures.FAKE)
    row, _ = pixel(plane, 0.0, 0.5)

    def blueness(x: float) -> int:
        patch = both[row - 10 : row + 10, pixel(plane, x, 0.0)[1] - 10 : pixel(plane, x, 0.0)[1] + 10].int()
        return int((patch[..., 2] - patch[..., 0]).median())

    assert blueness(1.2) > blueness(0.0) > blueness(-1.3)  # the score falls with the distance from (1, 0)


def test_limits_of_a_run_are_those_of_its_data() -> None:
    """Samples far away move nothing; a set that is no square gets one."""
    points = torch.tensor([[0.0, 0.0], [4.0, 1.0], [1.0, 0.5]]).repeat(20, 1)
    plane = Plane(Dataset(points))
    assert torch.allclose(plane.high - plane.low, torch.tensor(1.4 * 4.0))
    assert torch.allclose((plane.high + plane.low) / 2, torch.tensor([2.0, 0.5]))
    at = pixel(plane, 1.0, 0.5)
    assert near(plane.fakes(torch.tensor([[1e6, -1e6], [float("nan"), 0.0]]), 1), at, pictures.DATA)
    lattice = plane.lattice(COARSE)
    assert torch.equal(lattice[0], plane.low)
    assert torch.allclose(lattice[-1], plane.high)
    assert torch.all(lattice[:COARSE, 1] == plane.low[1])


def test_a_critic_that_says_nothing_is_drawn_too() -> None:
    flat = nn.Linear(2, 1)
    nn.init.zeros_(flat.weight)
    assert Plane(load("ring", limit=100)).fakes(torch.zeros(3, 2), 1, flat).shape == (HEIGHT, WIDTH, 3)


def test_histograms_show_at_most_twelve_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    to_picture = pictures.to_picture
    monkeypatch.setattr(pictures, "to_picture", lambda figure: shown.append(figure.get_suptitle()) or to_picture(figure))
    names = [str(i) for i in range(14)]
    fake = torch.full((20, 14), float("nan"))
    fake[:, 0] = 1e9
    assert pictures.histograms(torch.randn(300, 14, dtype=torch.float64), fake, names, "step 1").shape == (4 * 150 + 60, 720, 3)
    assert pictures.histograms(torch.full((10, 1), 5.0, dtype=torch.float64), None, names[:1], "data").shape == (210, 240, 3)
    assert shown == ["step 1, 12 of 14 columns", "data"]


def test_histograms_show_shares() -> None:
    """All that lies outside is in the outer bins, what is not finite in none."""
    edges = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    values = torch.tensor([-9.0, 0.5, 1.5, 1.7, 9.0, float("nan")])
    assert pictures._shares(values, edges).tolist() == pytest.approx([2 / 5, 3 / 5])


def test_views_fit_the_samples() -> None:
    assert isinstance(view_of(Dataset(torch.zeros(3, 1, 2, 2))), Grid)
    assert isinstance(view_of(Dataset(torch.rand(30, 2))), Plane)
    assert isinstance(view_of(Dataset(torch.zeros(3, 1))), Columns)
    assert isinstance(view_of(Dataset(torch.zeros(3, 5))), Columns)


def test_film(tmp_path: Path) -> None:
    """A white row wanders over black; of too many pictures some, with the first and the last."""
    frames = []
    for i in range(pictures.MOST_FRAMES + 50):
        picture = torch.zeros(8, 10, 3, dtype=torch.uint8)
        picture[i % 8] = 255
        frames.append(tmp_path / f"{i}.png")
        pictures.save_png(frames[-1], picture)
    for count, shown, pause in ((1, 1, 2000), (4, 4, 500), (len(frames), pictures.MOST_FRAMES, 100)):
        pictures.animate(tmp_path / "a.gif", frames[:count])
        with Image.open(tmp_path / "a.gif") as film:
            assert (getattr(film, "n_frames", 1), film.size) == (shown, (10, 8))
            assert film.info.get("duration", 2000) == pytest.approx(pause, abs=10)  # the format has hundredths of a second
            film.seek(shown - 1)
            assert np.asarray(film.convert("RGB"))[:, 0, 0].tolist() == [255 * (row == (count - 1) % 8) for row in range(8)]


def test_film_of_what_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a picture, PostScript (for which Pillow would start a program), another size: left out."""

    def start(*_: object, **__: object) -> None:
        raise AssertionError("a program was started")

    for name in ("Popen", "check_call"):
        monkeypatch.setattr(subprocess, name, start)
    frames = [tmp_path / f"{i}.png" for i in range(6)]
    for frame in frames:
        pictures.save_png(frame, torch.randint(256, (8, 10, 3), dtype=torch.uint8))
    frames[0].write_bytes(frames[0].read_bytes()[:90])
    frames[1].write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 8\n%%EndComments\n(%pipe%id) (r) file\n%%EOF\n")
    pictures.save_png(frames[2], torch.zeros(9, 10, 3, dtype=torch.uint8))
    pictures.animate(tmp_path / "a.gif", frames)
    with Image.open(tmp_path / "a.gif") as film:
        assert getattr(film, "n_frames", 1) == 3
    pictures.animate(tmp_path / "b.gif", frames[:2])
    assert not (tmp_path / "b.gif").exists()

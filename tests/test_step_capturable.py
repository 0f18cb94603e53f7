"""A whole step of each preset, operator by operator: nothing that waits for the device, depends on data or grows from step to step.

What a CUDA graph could not hold is refused where it is called: numbers for the host, shapes that depend on data, tensors made from
host data, copies from the host. It runs on the CPU, through the fused ops and through their definitions, and on the meta device,
where all branches but those for the CPU are taken. Not seen: what a GPU library or a launcher of Triton's does by itself.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gankern
from gankern import backend
from gankern.nn import _chain
from gankern.training import PRESETS, Trainer
from gankern.training.graph import Graph
from gankern.training.optimizers import Adam
from tests import small

# Operators without a tag of their own that wait for the device or take data from the host.
WAITING = frozenset(
    {"is_nonzero", "item", "_local_scalar_dense", "equal", "allclose", "nonzero", "masked_select", "aten.where.default"}
)
INDEXING = frozenset({"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"})
TO_HOST = frozenset({"tolist", "numpy", "cpu", "__array__", "pin_memory"})
FROM_HOST = frozenset({"lift_fresh", "lift_fresh_copy", "_pin_memory", "set_data"})
TAGS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class Capturable(TorchDispatchMode):
    """Raises at the first operator that a CUDA graph cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.names.append(name)
        if name in INDEXING:  # by numbers its shape is known, by a mask not
            waits = any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in tree_leaves(args[1]))
        else:
            waits = name in WAITING or str(func) in WAITING or any(tag in func.tags for tag in TAGS)
        assert not waits, f"{func} waits for the device, or its shape depends on data"
        assert name not in FROM_HOST, f"{func} takes data from the host"
        out = func(*args, **(kwargs or {}))
        assert all(isinstance(leaf, Tensor) or leaf is None for leaf in tree_leaves(out)), f"{func} gives the host a number"
        return out


class NoHost(TorchFunctionMode):
    """Raises at methods that copy to the host, which on the CPU reach no operator."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        assert name not in TO_HOST, f"Tensor.{name} waits for the device"
        return func(*args, **(kwargs or {}))


def live_bytes() -> int:
    """Of all tensors that the garbage collector knows and that are not frozen, each storage once."""
    gc.collect()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects() if type(t) is Tensor}
    return sum(storages.values())


def walk(preset: str, **changes: Any) -> Capturable:
    """Five steps as `Graph` captures them, the second under the modes; memory after steps 3, 4 and 5 must be the same."""
    settings = small.config(preset, **changes)
    trainer, batches = small.trainer(settings, capturable=True), small.batches(settings)
    bodies: list[Callable[[], None]] = []

    class Nothing:
        def replay(self) -> None: ...

    def keep(body: Callable[[], None], rewind: Callable[[], None], _: Trainer) -> Nothing:
        bodies.append(body)
        return Nothing()

    engine = Graph(trainer, batches, capture=keep)
    (body,) = bodies
    mode, memory = Capturable(), []
    gc.collect()
    gc.freeze()  # what is there already need not be looked at again
    try:
        for step in range(5):
            engine.rewind()
            if step == 1:
                with NoHost(), mode:
                    body()
            else:
                body()
            if step >= 2:
                memory.append(live_bytes())
    finally:
        gc.unfreeze()
    assert len(set(memory)) == 1, f"live memory after steps 3, 4 and 5: {memory} bytes"
    return mode


@pytest.mark.parametrize("backend_name", ["automatic", "reference"])
@pytest.mark.parametrize("preset", PRESETS)
def test_step_can_be_captured(preset: str, backend_name: str) -> None:
    if backend_name == "automatic":
        mode = walk(preset)
    else:
        with gankern.use_backend(backend_name):
            mode = walk(preset)
    assert {"index_select", "index_copy_"} <= set(mode.names)  # the batch, the losses
    assert {"_fused_adam_", "_foreach_addcdiv_"} & set(mode.names)  # the updates
    if backend_name == "reference":
        assert not any(name in dir(torch.ops.gankern) for name in mode.names)


@pytest.mark.parametrize("backend_name", ["automatic", "reference"])
def test_everything_at_once_can_be_captured(backend_name: str) -> None:
    changes: dict[str, Any] = {
        "clip_gradients": 0.5, "clip_weights": 0.3, "g_dropout": 0.2, "d_dropout": 0.2, "g_norm": "batch", "latent": "uniform",
        "n_critic": 2, "ema_warmup": False,
    }  # fmt: skip
    if backend_name == "automatic":
        walk("gan", **changes)
    else:
        with gankern.use_backend(backend_name):
            walk("gan", **changes)


@pytest.mark.parametrize(
    ("preset", "penalty"),
    [*(("gan", p) for p in ("gp", "lp", "0gp", "dragan", "r1", "r2", "r1r2")), ("sngan", "gp"), ("sngan", "r1")],
)
def test_every_penalty_can_be_captured(preset: str, penalty: str) -> None:
    walk(preset, penalty=penalty, spectral_norm=preset == "sngan")


@pytest.mark.parametrize("technique", small.TECHNIQUES)
def test_every_technique_can_be_captured(technique: str) -> None:
    walk("gan", **small.TECHNIQUES[technique])


@pytest.mark.parametrize("objective", ["wgan", "lsgan", "relativistic-hinge", "relativistic-average", "fgan-kl"])
def test_other_objectives_can_be_captured(objective: str) -> None:
    walk("gan", loss=objective, clip_weights=0.5, label_smoothing=1.0)


# --- the branches of a GPU


class OnDevice(Capturable):
    """On the meta device, which has no values: a tensor of the host has no business in a step there, of whatever size."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("_fused_adam_", "_fused_sgd_"):  # have no meta kernel; change their arguments only
            self.names.append(name)
            return None
        out = super().__torch_dispatch__(func, types, args, kwargs)
        for leaf in tree_leaves((args, kwargs, out)):
            assert not isinstance(leaf, Tensor) or leaf.is_meta, f"{func} takes data from the host"
        return out


CONV = {"gan_loss", "bias_lrelu", "bn_lrelu"}
FUSED: dict[str, set[str]] = {  # what each architecture, or preset, runs as
    "mlp": {"mlp_critic_pass"},
    "cgan": {"linear_lrelu_act", "gan_loss"},
    "sngan": CONV | {"spectral_norm"},
    "dcgan": CONV,
    "cdcgan": CONV,
    "acgan": CONV,
    "autoencoder": {"linear_lrelu_act"},
    "conv-autoencoder": {"bn_lrelu", "bias_lrelu", "spectral_norm"},
    "gmmn": {"pairwise_gram_"},
    "improved": {"gan_loss", "bias_lrelu"},  # of the smallest images: no BatchNorm in the critic, that of the generator is virtual
    "tabular": {"bn_lrelu", "mlp_critic_pass"},
    "pacgan-toy": {"bn_lrelu", "gan_loss"},
    "wgan-gp-toy": {"linear_lrelu_act", "mlp_critic_pass"},
    "unrolled-toy": {"linear_lrelu_act", "gan_loss"},
}


class NoGenerator:
    """There is none for the meta device, nor is one needed."""

    def __init__(self, *_: Any) -> None: ...

    def manual_seed(self, _: int) -> None: ...


def walk_on_meta(preset: str, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> OnDevice:
    """One step with what is_cpu and device.type choose elsewhere than on the CPU, the C++ ops by their signatures."""
    monkeypatch.setattr(backend, "compiled_problem", lambda device: "")
    monkeypatch.setattr(_chain, "_fits", lambda pending: True)
    settings = small.config(preset, **changes)
    with torch.device("meta"):
        networks = PRESETS[preset].build(settings, small.shape(settings), small.classes(settings))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "Generator", NoGenerator)
        trainer = Trainer(*networks, settings, "meta", capturable=False)
    trainer.clock = torch.zeros((), device="meta")
    for optimizer in (trainer.opt_g, trainer.opt_d):  # as capturable=True leaves it: its checks would read the number
        optimizer.param_groups[0]["lr"] = torch.zeros((), device="meta")
    n = settings.batch_size * settings.n_critic
    real = torch.empty(n, *small.shape(settings), device="meta")
    labels = [torch.empty(n, dtype=torch.int64, device="meta")] if small.classes(settings) else []
    mode = OnDevice()
    with NoHost(), mode:
        trainer.step(real, *labels)
    return mode


@pytest.mark.parametrize("preset", PRESETS)
def test_step_can_be_captured_off_the_cpu(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = PRESETS[preset].config
    of_generator = {"bn_lrelu" if config.g_norm == "batch" else "linear_lrelu_act"} if config.arch == "mlp" else set()
    assert FUSED.get(preset, FUSED[config.arch]) | of_generator <= set(walk_on_meta(preset, monkeypatch).names)
    with gankern.use_backend("reference"):
        names = walk_on_meta(preset, monkeypatch).names
    assert not any(hasattr(torch.ops.gankern, name) for name in names)


@pytest.mark.parametrize("technique", small.TECHNIQUES)
def test_techniques_can_be_captured_off_the_cpu(technique: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """(But for spectral norm, whose derivative asks for an autocast that the meta device does not have.)"""
    walk_on_meta("gan", monkeypatch, **{**small.TECHNIQUES[technique], "spectral_norm": False})


def test_host_data_is_found_off_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch, lambda opt: opt.count.mul_(torch.ones(())))
    with pytest.raises(AssertionError, match="takes data from the host"):
        walk_on_meta("gan", monkeypatch)


# --- what the walk sees


def mutant(monkeypatch: pytest.MonkeyPatch, extra: Callable[[Adam], Any]) -> None:
    update = Adam.update

    def changed(self: Adam) -> None:
        extra(self)
        update(self)

    monkeypatch.setattr(Adam, "update", changed)


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        (lambda opt: opt.count.item(), "waits for the device"),
        (lambda opt: float(opt.count), "waits for the device"),
        (lambda opt: bool(opt.averages[0].isnan().any()), "waits for the device"),
        (lambda opt: opt.averages[0].tolist(), "waits for the device"),
        (lambda opt: torch.equal(opt.averages[0], opt.squares[0]), "waits for the device"),
        (lambda opt: opt.averages[0].nonzero(), "depends on data"),
        (lambda opt: opt.averages[0][opt.averages[0] > 0], "depends on data"),
        (lambda opt: opt.averages[0].unique(), "depends on data"),
        (lambda opt: torch.where(opt.averages[0] > 0), "depends on data"),
        (lambda opt: opt.count.add_(torch.tensor(0.0)), "takes data from the host"),
    ],
)
def test_mutants_that_wait_are_found(extra: Callable[[Adam], Any], sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch, extra)
    with pytest.raises(AssertionError, match=sentence):
        walk("gan")


def test_a_mutant_that_keeps_its_losses_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Tensor] = []
    step = Trainer.step

    def keeping(self: Trainer, real: Tensor, *labels: Tensor) -> dict[str, Tensor]:
        out = step(self, real, *labels)
        kept.append(out["d_loss"])
        return out

    monkeypatch.setattr(Trainer, "step", keeping)
    with pytest.raises(AssertionError, match="live memory after steps 3, 4 and 5"):
        walk("gan")

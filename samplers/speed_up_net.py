"""SpeedUpNet: an adapter by which one branch in four steps takes in the negative prompt too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

from accel.adapter_hosts import weight_hosts
from accel.attention_calls import AttentionCall, AttentionLayer, attention_layers, intercept
from accel.denoiser import Denoiser
from accel.family import ENCODER, Arguments
from accel.guidance import half, is_doubled
from accel.low_rank import LowRank, LowRankConfig
from accel.method import AccelError, Handle
from accel.model_calls import dressed
from accel.report import StepRow
from accel.site import Branch

if TYPE_CHECKING:
    from torch import Tensor

FILE_NAME = "adapters/speed_up_net.safetensors"
RANK = 8
"""Of the offsets that training begins with; a file says its own."""
WHOLE = 2.0
"""The scale at which offsets made for scales 1 to 2 are there as trained."""


@dataclass(frozen=True)
class SpeedUpNet:
    """Run the conditional branch alone; an adapter brings guidance and the negative prompt into it.

    Chai et al., "SpeedUpNet" (SUN), ECCV 2024, for U-Nets with cross-attention. Beside each
    cross-attention h to the prompt, new keys and values attend to the negative prompt (n) and to
    the prompt (p), both scaled to the norm of h and given an affine map a channel: what goes on is
    h − n̂ + p̂. The adapter is trained for one model to do four steps of DDIM or DPM-Solver++ with
    timestep spacing "trailing"; `python -m demos.zoo.speed_up_net train` trains one. Differs from
    the paper: low-rank offsets of all weights (`accel.low_rank`) are trained with it and lie in the
    weights while a run lasts.

    `path`: its safetensors file; None takes `adapters/speed_up_net.safetensors` beside the model.
    The pipeline is called as ever, with a guidance scale above 1 and a negative prompt; how strong
    the guidance is was fixed in training, so that scale has no other effect. Differs from the
    paper's code, too: negative text comes by the pipeline's own negative half instead of a doubled
    prompt, so that ControlNets never see it, and norms are those of each sample, so that rows of a
    batch are independent.

    Raises `AccelError` for a file that does not fit the model, without cross-attention, and when a
    run has guidance off.
    """

    slot: ClassVar[str] = "guidance"
    files: ClassVar[tuple[str, ...]] = ("path",)
    trials: ClassVar[tuple[dict[str, Any], ...]] = ({},)

    path: str | None = None

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to the guidance branches and to all cross-attention layers."""
        layers = cross_attention(denoiser.module)
        net = loaded(self._file(denoiser), layers, denoiser.module)
        branch = _OneBranch(denoiser, net)
        handles = [net.weights.serve(denoiser)]
        try:
            handles.append(denoiser.between(branch.call, "SpeedUpNet"))
            handles.append(intercept(denoiser, layers, branch.attend))
        except BaseException:
            Handle.together(handles).remove()
            raise
        return Handle.together(handles)

    def _file(self, denoiser: Denoiser) -> Path:
        origin = denoiser.module.config.get("_name_or_path") or "."
        file = Path(self.path) if self.path else Path(origin).parent / FILE_NAME
        if not file.is_file():
            raise AccelError(
                f"SpeedUpNet(path={self.path!r}): {file} is no file; give the adapter that was "
                "trained for this model"
            )
        return file


class NegativeAttention(nn.Module):
    """One new pair of keys and values with its affine map."""

    def __init__(self, host: Any) -> None:
        super().__init__()
        width, inner = host.to_k.in_features, host.to_k.out_features
        self.to_k = nn.Linear(width, inner, bias=False)
        self.to_v = nn.Linear(width, inner, bias=False)
        self.scale = nn.Parameter(torch.ones(inner))
        self.shift = nn.Parameter(torch.zeros(inner))
        self.load_state_dict(
            {"to_k.weight": host.to_k.weight, "to_v.weight": host.to_v.weight}, strict=False
        )

    def forward(self, query: Tensor, text: Tensor, beside: Tensor) -> Tensor:
        """n̂ of text (batch, tokens, width); the others are (batch, heads, tokens, head_dim)."""
        heads = query.shape[1]
        key, value = (
            project(text).unflatten(2, (heads, -1)).transpose(1, 2)
            for project in (self.to_k, self.to_v)
        )
        found = functional.scaled_dot_product_attention(query, key, value)
        norms = [  # in fp32: the sum of squares leaves the range of fp16
            each.flatten(1).norm(dim=1, dtype=torch.float32)[:, None, None, None]
            for each in (beside, found)
        ]
        scale, shift = (each.view(heads, 1, -1) for each in (self.scale, self.shift))
        ratio = (norms[0] / norms[1].clamp(min=1e-6)).to(found.dtype)
        return scale * found * ratio + shift  # type: ignore[no-any-return]


class SpeedUpLayer(nn.Module):
    """What is new beside one cross-attention layer."""

    def __init__(self, host: Any) -> None:
        super().__init__()
        self.negative, self.positive = NegativeAttention(host), NegativeAttention(host)

    def forward(self, attended: Tensor, query: Tensor, prompt: Tensor, negative: Tensor) -> Tensor:
        """h − n̂ + p̂, h and the query being (batch, heads, tokens, head_dim)."""
        taken = self.negative(query, negative, attended)
        added = self.positive(query, prompt, attended)
        return attended - taken + added  # type: ignore[no-any-return]


def cross_attention(unet: Any) -> list[AttentionLayer]:
    """The layers that attend to the prompt; raises when there are none."""
    layers = [layer for layer in attention_layers(unet) if layer.crosses]
    if not layers:
        raise AccelError(
            f"SpeedUpNet needs cross-attention to the prompt; {type(unet).__name__} has none"
        )
    return layers


class SpeedUp(nn.Module):
    """All that is trained: a part beside each cross-attention (`:` for `.` in the names of these
    layers), starting with the host's keys and values, and offsets of weights (`hosts`: shapes)."""

    def __init__(
        self, unet: Any, layers: list[AttentionLayer], hosts: dict[str, list[int]], rank: int
    ) -> None:
        super().__init__()
        named = {layer.name.replace(".", ":"): SpeedUpLayer(layer.module) for layer in layers}
        self.layers = nn.ModuleDict(named)
        config = LowRankConfig(type(unet).__name__, hosts, rank, scales=(1.0, WHOLE))
        self.weights = LowRank(config)
        self.weights.guidance = WHOLE


def fresh(unet: Any) -> SpeedUp:
    """An adapter as training begins with it: with equal texts it changes nothing."""
    net = SpeedUp(unet, cross_attention(unet), weight_hosts(unet), RANK)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(not name.endswith(".bend"))  # one scale has no curve
    return net


def loaded(file: Path, layers: list[AttentionLayer], unet: Any) -> SpeedUp:
    """The adapter of a file, or `AccelError` when it was made for other layers."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(file)
        net = SpeedUp(unet, layers, *_offsets_in(weights))
        net.load_state_dict(weights)
    except (SafetensorError, KeyError) as error:
        raise AccelError(f"SpeedUpNet: {file} cannot be read ({error})") from error
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise AccelError(
            f"SpeedUpNet: {file} was trained for another model than this {type(unet).__name__}: "
            f"{reason}"
        ) from error
    return net.requires_grad_(False).eval()


def _offsets_in(weights: dict[str, Tensor]) -> tuple[dict[str, list[int]], int]:
    """The hosts whose offsets a file holds, with the shapes of their weights, and the rank."""
    start, end = "weights.offsets.", ".up"
    hosts, rank = {}, 1
    for key, up in weights.items():
        if key.startswith(start) and key.endswith(end):
            inputs = weights[key.removesuffix(end) + ".down"].shape[1:]
            path = key.removeprefix(start).removesuffix(end).replace(":", ".")
            hosts[path] = [len(up), *inputs]
            rank = max(rank, up.shape[1])
    return hosts, rank


class _OneBranch:
    """Runs the conditional half alone, while cross-attention sees both texts."""

    def __init__(self, denoiser: Denoiser, net: SpeedUp) -> None:
        self.denoiser, self.net = denoiser, net
        self.texts: tuple[Tensor, Tensor] | None = None
        """Prompt and negative prompt of the call in flight."""
        self.seen: set[str] = set()
        """Layers whose attention took both texts in this call."""

    def call(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The pipeline calls the denoiser with the negative half first."""
        arguments = Arguments(self.denoiser.names, args, kwargs)
        if not is_doubled(self.denoiser, arguments):
            raise AccelError(
                "SpeedUpNet takes the negative prompt from the guidance that it replaces; call the "
                "pipeline with a guidance scale above 1"
            )
        negative, prompt = arguments.get(ENCODER).chunk(2)
        self.net.to(prompt)
        self.net.weights.begin(WHOLE)
        self.texts, self.seen = (prompt, negative), set()
        try:
            output = run(Branch("cond", 0), *half(arguments, 1))
        finally:
            self.texts = None
        self._check_layers()
        rows = self.denoiser.rows
        left_out = StepRow(
            self.denoiser.name, "uncond", rows[-1].step, "left out", 0, 0, rows[-1].blocks
        )
        rows.append(left_out)
        return dressed(output)(torch.cat((output[0], output[0])))

    def _check_layers(self) -> None:
        """In a run's first step, which is computed, every layer must have come by."""
        missed = {name.replace(":", ".") for name in self.net.layers} - self.seen
        if missed and self.denoiser.clock.step == 0:
            raise AccelError(
                f"SpeedUpNet: {len(missed)} cross-attention layers, first {min(missed)!r}, have a "
                "processor that does not call scaled_dot_product_attention (attention slicing?)"
            )

    def attend(self, call: AttentionCall) -> Tensor:
        """Cross-attention in one layer."""
        attended = call.plain()
        if self.texts is None:
            return attended
        self.seen.add(call.layer.name)
        layer = self.net.layers[call.layer.name.replace(".", ":")]
        mixed: Tensor = layer(attended, call.query, *self.texts)
        return mixed

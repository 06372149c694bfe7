"""Hugging Face safetensors to this model's shards and back, driven by one table of names.

Every parameter is made of one to three Hugging Face tensors. Each of those is cut along one
dimension over the tensor ranks (or not at all), and a rank's pieces are joined along dimension 0.
Both directions follow from that one sentence, so there is no second table to keep in step.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ovr_fast.errors import ModelError, SaveError
from ovr_fast.model.qwen25_vl import Qwen25VLStage
from ovr_fast.parallel.mesh import Mesh
from ovr_fast.shape.cost import split_layers
from ovr_fast.shape.model_shape import ModelShape

SHARD_BYTES = 4 * 2**30
"""Largest file that ``save_hf`` writes."""


@dataclass(frozen=True, slots=True)
class HFTensor:
    """One Hugging Face tensor inside a parameter."""

    name: str
    shape: tuple[int, ...]
    cut: int | None  # dimension sharded over tensor ranks; None where every rank has it whole


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of this model and the Hugging Face tensors it is made of."""

    ours: str
    pipeline_stage: int  # that owns it
    tensors: tuple[HFTensor, ...]
    vision_part: str | None = None  # "tower", "merger", or None for the language model
    reshape: tuple[int, ...] | None = None  # our shape, where Hugging Face stores another


def parameter_table(shape: ModelShape, pp: int, *, value_head: bool) -> list[Parameter]:
    """Every parameter of the whole model, in the order in which they are sent and saved."""
    h, kv, last = shape.hidden, shape.kv_heads * shape.head_dim, pp - 1
    rows = []

    def add(ours: str, stage: int, *tensors: tuple, kind: str | None = None, reshape=None) -> None:
        rows.append(Parameter(ours, stage, tuple(HFTensor(*t) for t in tensors), kind, reshape))

    v = shape.vision
    pixels = (v.hidden, v.channels, v.temporal_patch_size, v.patch_size, v.patch_size)
    add(
        "visual.patch_embed.weight",
        0,
        ("visual.patch_embed.proj.weight", pixels, None),
        kind="tower",
        reshape=(v.hidden, v.patch_dim),
    )
    for i in range(v.layers):
        ours, theirs = f"visual.blocks.{i}", f"visual.blocks.{i}"
        for norm in ("norm1", "norm2"):
            name = f"{norm}.weight"
            add(f"{ours}.{name}", 0, (f"{theirs}.{name}", (v.hidden,), None), kind="tower")
        for mine, hf, out, width in (
            ("qkv", "attn.qkv", 3 * v.hidden, v.hidden),
            ("proj", "attn.proj", v.hidden, v.hidden),
            ("gate", "mlp.gate_proj", v.intermediate, v.hidden),
            ("up", "mlp.up_proj", v.intermediate, v.hidden),
            ("down", "mlp.down_proj", v.hidden, v.intermediate),
        ):
            add(
                f"{ours}.{mine}.weight",
                0,
                (f"{theirs}.{hf}.weight", (out, width), None),
                kind="tower",
            )
            add(f"{ours}.{mine}.bias", 0, (f"{theirs}.{hf}.bias", (out,), None), kind="tower")
    wide = v.hidden * v.merge_size**2
    for mine, hf, size in (
        ("norm.weight", "ln_q.weight", (v.hidden,)),
        ("fc1.weight", "mlp.0.weight", (wide, wide)),
        ("fc1.bias", "mlp.0.bias", (wide,)),
        ("fc2.weight", "mlp.2.weight", (v.out_hidden, wide)),
        ("fc2.bias", "mlp.2.bias", (v.out_hidden,)),
    ):
        add(f"visual.merger.{mine}", 0, (f"visual.merger.{hf}", size, None), kind="merger")

    embedding = ("model.embed_tokens.weight", (shape.vocab, h), 0)
    add("embedding.weight", 0, embedding)
    for stage, layers in enumerate(split_layers(shape, pp, head=not value_head)):
        for i in layers:
            ours, theirs = f"layers.{i}", f"model.layers.{i}"
            attention = f"{theirs}.self_attn"
            add(
                f"{ours}.attention_norm.weight",
                stage,
                (f"{theirs}.input_layernorm.weight", (h,), None),
            )
            for part in ("weight", "bias"):
                tail = (h,) if part == "weight" else ()
                add(
                    f"{ours}.attention.qkv.{part}",
                    stage,
                    (f"{attention}.q_proj.{part}", (h, *tail), 0),
                    (f"{attention}.k_proj.{part}", (kv, *tail), 0),
                    (f"{attention}.v_proj.{part}", (kv, *tail), 0),
                )
            add(f"{ours}.attention.proj.weight", stage, (f"{attention}.o_proj.weight", (h, h), 1))
            add(
                f"{ours}.mlp_norm.weight",
                stage,
                (f"{theirs}.post_attention_layernorm.weight", (h,), None),
            )
            width = shape.intermediate
            add(
                f"{ours}.mlp.gate_up.weight",
                stage,
                (f"{theirs}.mlp.gate_proj.weight", (width, h), 0),
                (f"{theirs}.mlp.up_proj.weight", (width, h), 0),
            )
            add(f"{ours}.mlp.down.weight", stage, (f"{theirs}.mlp.down_proj.weight", (h, width), 1))
    add("norm.weight", last, ("model.norm.weight", (h,), None))
    if value_head:
        add("value_head.weight", last, ("value_head.weight", (1, h), None))
    elif not shape.tied_embeddings:
        add("head.weight", last, ("lm_head.weight", (shape.vocab, h), 0))
    return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Rectangle:
    """Part of a Hugging Face tensor, and where it stands in a rank's flat range of a parameter."""

    tensor: str  # name of the Hugging Face tensor
    shape: tuple[int, ...]  # of the whole tensor, as this model has it
    offsets: tuple[int, ...]  # where the rectangle begins in it
    sizes: tuple[int, ...]
    begin: int  # in the flat range
    end: int
    first_replica: bool  # False on tensor ranks that hold what the first one holds


def rectangles(row: Parameter, start: int, end: int, mesh: Mesh) -> list[Rectangle]:
    """Entries ``start:end`` of this rank's flattened shard of a parameter, which the distributed
    optimizer cuts without regard to rows, as rectangles of whole tensors: at most an end of a row,
    whole rows, and a beginning of a row, of each part."""
    found = []
    base = 0  # where the part begins in the flattened shard
    for part in row.tensors:
        whole = row.reshape or part.shape
        local = list(whole)
        if part.cut is not None:
            local[part.cut] //= mesh.tp
        corner = [0] * len(whole)
        if part.cut is not None:
            corner[part.cut] = mesh.tp_rank * local[part.cut]
        width = local[-1]
        size = local[0] * width if len(local) == 2 else width
        at, stop = max(start, base), min(end, base + size)
        while at < stop:
            line, column = divmod(at - base, width)
            if column == 0 and stop - at >= width:
                lines, columns = (stop - at) // width, width
            else:
                lines, columns = 1, min(width - column, stop - at)
            flat = len(local) == 1
            found.append(
                Rectangle(
                    tensor=part.name,
                    shape=whole,
                    offsets=(corner[0] + column,)
                    if flat
                    else (corner[0] + line, corner[1] + column),
                    sizes=(columns,) if flat else (lines, columns),
                    begin=at - start,
                    end=at - start + lines * columns,
                    first_replica=part.cut is not None or mesh.tp_rank == 0,
                )
            )
            at += lines * columns
        base += size
    return found


_ALIASES = (
    (re.compile(r"^model\.visual\."), "visual."),
    (re.compile(r"^model\.language_model\."), "model."),
)


def published_name(name: str) -> str:
    """The name that Qwen published a tensor under, from that or transformers 5's inner name."""
    for pattern, replacement in _ALIASES:
        name = pattern.sub(replacement, name)
    return name


class HFReader:
    """Reads slices of tensors from a Hugging Face folder of one or many safetensors files.

    Raises:
        ModelError: no weights in the folder, or an index that names a missing file.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            names = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if not names:
            raise ModelError(f"{folder} holds no safetensors; model.path must hold the weights")
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            if (self.folder / name).exists():
                raise ModelError(
                    f"{folder} holds an adapter ({name}), which would be left out; merge it into "
                    "the weights, or remove it"
                )
        self._where: dict[str, tuple[Any, str]] = {}
        source: dict[str, str] = {}  # file of each tensor
        others = {path.name for path in self.folder.glob("*.safetensors")} - set(names)
        for name in [*names, *sorted(others)]:
            path = self.folder / name
            if not path.is_file():
                raise ModelError(f"{path} is named in {index.name} but missing; fetch it again")
            try:
                file = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path} cannot be read ({error}); fetch it again") from error
            for key in file.keys():  # noqa: SIM118 - not a dict
                tensor = published_name(key)
                if tensor in source:
                    raise ModelError(
                        f"{folder} holds two sets of weights: {tensor} is in {source[tensor]} and "
                        f"in {name}; leave one"
                    )
                if name not in others:
                    source[tensor], self._where[tensor] = name, (file, key)

    def read(self, part: HFTensor, rank: int, ranks: int) -> Tensor:
        """This rank's piece of one tensor.

        Raises:
            ModelError: the tensor is missing or of another shape.
        """
        if part.name not in self._where:
            raise ModelError(f"{self.folder}: weight {part.name} is missing")
        file, key = self._where[part.name]
        view = file.get_slice(key)
        if tuple(view.get_shape()) != part.shape:
            raise ModelError(
                f"{self.folder}: weight {part.name} has shape {tuple(view.get_shape())}, "
                f"config.json says {part.shape}"
            )
        if part.cut is None or ranks == 1:
            return view[:]
        size = part.shape[part.cut] // ranks
        cut = slice(rank * size, (rank + 1) * size)
        return view[cut] if part.cut == 0 else view[:, cut]


def load_hf(model: Qwen25VLStage, folder: str | Path) -> None:
    """Fill ``model`` with its shards of the weights in ``folder``.

    A critic keeps its fresh value head; Hugging Face folders hold none.

    Raises:
        ModelError: a tensor is missing, has another shape, or a parameter would stay unfilled.
    """
    reader, mesh, shape = HFReader(folder), model.mesh, model.shape
    ours = dict(model.named_parameters())
    with torch.no_grad():
        for row in parameter_table(shape, mesh.pp, value_head=model.is_critic):
            # With tied embeddings the last stage has a copy of the first stage's.
            target = ours.pop(row.ours, None)
            if target is None:
                continue
            if row.ours == "value_head.weight":
                continue
            pieces = [reader.read(part, mesh.tp_rank, mesh.tp) for part in row.tensors]
            joined = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
            target.copy_(joined.reshape(target.shape))
    assert not ours, f"parameters without a row in the table: {sorted(ours)}"


def export_hf(
    model: Qwen25VLStage,
    *,
    skip_parts: tuple[str, ...] = (),
    values: dict[str, Tensor] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Stream the whole model as (Hugging Face name, whole tensor), one parameter at a time.

    A collective of all ranks of one data-parallel replica, in the order of the table; the tensors
    are whole on the first stage's first tensor rank of each replica and to be ignored elsewhere.
    At no time is there more than one parameter beside the model.

    Args:
        skip_parts: parts to leave out, of "tower" and "merger" (frozen ones need no sync).
        values: stream these instead of the weights: tensors (gradients, say) by parameter name,
            of one dtype.
    """
    mesh, shape = model.mesh, model.shape
    ours = dict(model.named_parameters()) if values is None else values
    dtype = next(iter(ours.values())).dtype
    pipeline = dist.get_process_group_ranks(mesh.pp_group)
    for row in parameter_table(shape, mesh.pp, value_head=model.is_critic):
        if row.vision_part in skip_parts:
            continue
        local = ours[row.ours].detach() if mesh.pp_rank == row.pipeline_stage else None
        sizes = [_piece_shape(part, mesh.tp) for part in row.tensors]
        if row.pipeline_stage != 0:  # the owner hands its shard to the first stage
            kind = torch.float32 if row.ours == "value_head.weight" else dtype
            if mesh.pp_rank == row.pipeline_stage:
                assert local is not None
                dist.send(local.contiguous(), pipeline[0], group=mesh.pp_group)
            elif mesh.pp_rank == 0:
                shape_here = (sum(s[0] for s in sizes), *sizes[0][1:])
                local = torch.empty(shape_here, dtype=kind, device=mesh.device)
                dist.recv(local, pipeline[row.pipeline_stage], group=mesh.pp_group)
        if mesh.pp_rank != 0:
            for part in row.tensors:
                yield part.name, torch.empty(0)
            continue
        assert local is not None
        if row.reshape is not None:
            yield row.tensors[0].name, local.reshape(row.tensors[0].shape)
            continue
        pieces = local.split([size[0] for size in sizes])
        for part, piece in zip(row.tensors, pieces, strict=True):
            yield part.name, _gather(piece, part.cut, mesh)


def export_hf_everywhere(
    model: Qwen25VLStage, *, skip_parts: tuple[str, ...] = ()
) -> Iterator[tuple[str, Tensor]]:
    """``export_hf`` with the whole tensors on every rank, for servers on the ranks' own GPUs."""
    mesh = model.mesh
    first = dist.get_process_group_ranks(mesh.model_group)[0]
    dtype = next(model.parameters()).dtype
    rows = parameter_table(model.shape, mesh.pp, value_head=model.is_critic)
    shapes = {part.name: part.shape for row in rows for part in row.tensors}
    for name, tensor in export_hf(model, skip_parts=skip_parts):
        if mesh.model_rank == 0:
            whole = tensor.contiguous()
        else:
            whole = torch.empty(shapes[name], dtype=dtype, device=mesh.device)
        dist.broadcast(whole, first, group=mesh.model_group)
        yield name, whole


def _piece_shape(part: HFTensor, tp: int) -> tuple[int, ...]:
    if part.cut is None:
        return part.shape
    return tuple(n // tp if d == part.cut else n for d, n in enumerate(part.shape))


def _gather(piece: Tensor, cut: int | None, mesh: Mesh) -> Tensor:
    if cut is None or mesh.tp == 1:
        return piece
    piece = piece.contiguous()
    parts = [torch.empty_like(piece) for _ in range(mesh.tp)]
    dist.all_gather(parts, piece, group=mesh.tp_group)
    return torch.cat(parts, dim=cut)


def save_hf(
    model: Qwen25VLStage,
    folder: str | Path,
    *,
    like: str | Path,
    sampling: dict[str, Any] | None = None,
) -> None:
    """Write the model as a Hugging Face folder: sharded safetensors, plus config, tokenizer and
    processor files copied from ``like``. A collective of all ranks; the first rank writes.

    Args:
        sampling: see ``generation_config``.

    The folder appears under its name only when it is complete.

    Raises:
        SaveError: the disk is full or the folder cannot be written; nothing half-written remains.
    """
    writer: ShardWriter | None = None
    failure: OSError | None = None
    if model.mesh.rank == 0:
        try:
            writer = ShardWriter(Path(folder), Path(like), sampling=sampling)
        except OSError as error:  # keep joining the collectives, raise on all ranks below
            failure = error
    for name, tensor in export_hf(model):
        if writer is not None and failure is None:
            try:
                writer.add(name, tensor)
            except OSError as error:
                failure = error
    if writer is not None:
        try:
            if failure is None:
                writer.finish()
        except OSError as error:
            failure = error
        if failure is not None:
            writer.discard()
    # Over gloo without the collectives' time limit: rank 0 may write for a quarter of an hour.
    if model.mesh.broadcast_object(failure is not None):
        raise SaveError(f"could not save {folder}: {failure or 'see rank 0'}") from failure


def belongs_to_any_weights(name: str) -> bool:
    """Whether a file of a model's folder is true of other weights too: configuration, tokenizer,
    processor, chat template, licence. Never weights, adapters or a trainer's state."""
    if name.upper().startswith(("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")):
        return True
    if name.endswith(".index.json") or name.startswith(("adapter_", "trainer_", "training_")):
        return False
    return name.endswith((".json", ".jinja", ".txt", ".model", ".tiktoken"))


def generation_config(like: Path, sampling: dict[str, Any] | None) -> dict[str, Any]:
    """How transformers and vLLM sample from a folder that says nothing else: as the policy was
    trained, with the token ids of ``like``.

    A base's own settings are for another model: Qwen2.5-VL's hold a repetition penalty of 1.05,
    which vLLM applies by default. transformers keeps the 50 likeliest tokens unless told not to.

    Args:
        like: folder of the model that was trained.
        sampling: "temperature" and "top_p" of training; None: those that ``like`` has, or 1.
    """
    path = like / "generation_config.json"
    there = json.loads(path.read_text()) if path.is_file() else {}
    kept = {key: value for key, value in there.items() if key.endswith("token_id")}
    given = there if sampling is None else sampling
    found = {key: float(given.get(key, 1.0)) for key in ("temperature", "top_p")}
    if sampling is None and there.get("repetition_penalty", 1.0) != 1.0:
        found = dict.fromkeys(found, 1.0)  # a base's
    return kept | {"do_sample": True, **found, "top_k": 0, "repetition_penalty": 1.0}


class ShardWriter:
    """Collects tensors into files of at most ``SHARD_BYTES`` in a folder beside the final one."""

    def __init__(self, folder: Path, like: Path, *, sampling: dict[str, Any] | None = None) -> None:
        self.final, self.partial = folder, folder.with_name(folder.name + ".partial")
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        for path in like.iterdir():
            if path.is_file() and belongs_to_any_weights(path.name):
                shutil.copyfile(path, self.partial / path.name)
        self.config = json.loads((like / "config.json").read_text())
        self.generation = generation_config(like, sampling)
        self.pending: dict[str, Tensor] = {}
        self.pending_bytes = 0
        self.files: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """The next whole tensor, under its published name."""
        self._state_dtype(self.config, str(tensor.dtype).removeprefix("torch."))
        size = tensor.numel() * tensor.element_size()
        if self.pending and self.pending_bytes + size > SHARD_BYTES:
            self._flush()
        self.pending[name] = tensor.cpu().contiguous().clone()
        self.pending_bytes += size

    def _state_dtype(self, node: dict, dtype: str) -> None:
        """Make ``config.json`` name the dtype that the files hold, wherever it names one."""
        for key, value in node.items():
            if key in ("dtype", "torch_dtype"):
                node[key] = dtype
            elif isinstance(value, dict):
                self._state_dtype(value, dtype)

    def _flush(self) -> None:
        path = self.partial / f"part-{len(self.files)}.safetensors"
        try:
            save_file(self.pending, path, metadata={"format": "pt"})
        except SafetensorError as error:  # how safetensors reports a full disk
            raise OSError(str(error)) from error
        self.files.append(sorted(self.pending))
        self.pending, self.pending_bytes = {}, 0

    def finish(self) -> None:
        """Write what is pending and give the folder its name."""
        self._flush()
        count, where, total = len(self.files), {}, 0
        for number, names in enumerate(self.files):
            final = (
                "model.safetensors"
                if count == 1
                else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            )
            part = self.partial / f"part-{number}.safetensors"
            total += part.stat().st_size
            part.rename(self.partial / final)
            where.update(dict.fromkeys(names, final))
        if count > 1:
            index = {"metadata": {"total_size": total}, "weight_map": where}
            (self.partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        for name, held in (
            ("config.json", self.config),
            ("generation_config.json", self.generation),
        ):
            (self.partial / name).write_text(json.dumps(held, indent=2) + "\n")
        old = self.final.with_name(self.final.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if self.final.exists():
            self.final.rename(old)
        self.partial.rename(self.final)
        shutil.rmtree(old, ignore_errors=True)

    def discard(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self.partial, ignore_errors=True)

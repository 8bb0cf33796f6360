"""The memory and time of a run, known before it runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from microtome.anatomy import Address, Site, sizes
from microtome.context import current
from microtome.errors import BudgetError, error
from microtome.run._batch import Batch
from microtome.run._core import LoadedModel
from microtome.shown import brief, shown

FIXED = 64
"""What a layer costs before its first token, in tokens: reading its weights takes as long as computing so many."""


@shown
@dataclass(frozen=True)
class Plan:
    """The cost of a run.

    Attributes:
        bytes_by_address: what each address would keep.
        logits_bytes: what the logits take.
        flops: floating-point operations of the forward, two a weight and token, plus attention's.
        seconds: at the pace of this model's last run; a first guess before any.
    """

    bytes_by_address: dict[str, int]
    logits_bytes: int
    flops: float
    seconds: float

    @property
    def bytes(self) -> int:
        """All that is kept."""
        return sum(self.bytes_by_address.values()) + self.logits_bytes

    def _facts(self) -> dict[str, str]:
        """What it keeps, and its cost."""
        kept = {name: in_bytes(size) for name, size in self.bytes_by_address.items()}
        return {
            "captured": brief(kept),
            "logits": in_bytes(self.logits_bytes),
            "together": in_bytes(self.bytes),
            "flops": f"{self.flops:.2g}",
            "seconds": f"{self.seconds:.2g}",
        }

    def __str__(self) -> str:
        lines = [f"{name:32} {in_bytes(size):>14}" for name, size in self.bytes_by_address.items()]
        lines.append(f"{'logits':32} {in_bytes(self.logits_bytes):>14}")
        lines.append(f"{'together':32} {in_bytes(self.bytes):>14}, about {self.seconds:.2g} s")
        return "\n".join(lines)


def plan_of(
    model: LoadedModel, batch: Batch, captures: Sequence[Address], *, logits: bool, grad: bool, pace: float
) -> Plan:
    """The plan of a run over a batch."""
    a, (rows, width) = model.anatomy, batch.tokens.shape
    size = torch.finfo(model.dtype).bits // 8
    kept: dict[str, int] = {}
    for address in captures:
        # Scales are kept in float32 whatever the model's own type.
        each = 4 if address.name.endswith(".scale") else size
        held = sum(_elements(model, batch, address, site) for site in a.sites(address))
        kept[str(address)] = held * each * (2 if grad else 1)
    tokens = rows * width
    read, written = model.hf.get_input_embeddings(), model.hf.get_output_embeddings()
    weights = model.n_parameters - math.prod(sizes(read))
    weights -= 0 if getattr(written, "weight", None) is getattr(read, "weight", 0) else math.prod(sizes(written))
    flops = 2.0 * tokens * weights + 4.0 * rows * width * width * a.n_heads * a.d_head * a.n_layers
    if captures and not logits:  # the run ends in the last layer that is named
        sites = [site for address in captures for site in a.sites(address)]
        last = max(a.n_layers if s.layer is None and s.name != "embed" else (s.layer or 0) + 1 for s in sites)
        flops *= min(last, a.n_layers) / a.n_layers
    written = a.size(Site("logits"), "vocab")
    flops += 2.0 * tokens * a.d_model * written if logits else 0.0
    work = flops * (tokens + FIXED) / tokens * (3 if grad else 1)
    return Plan(kept, tokens * written * size if logits else 0, flops, work / pace)


def _elements(model: LoadedModel, batch: Batch, address: Address, site: Site) -> int:
    a, (rows, width) = model.anatomy, batch.tokens.shape
    sizes = {"batch": rows, "pos": width, "q_pos": width, "k_pos": width}
    sizes |= {axis: a.size(site, axis) for axis in site.spec.dims if axis not in sizes}
    if not address.units.is_all:
        sizes[address.spec.unit] = len(address.units.resolve(a.units(site)) or ())
    if isinstance(address.positions, str):
        sizes[address.spec.pos] = 1 if address.positions == "last" else width
    elif not address.positions.is_all:
        sizes[address.spec.pos] = len(address.positions.resolve(min(batch.lengths)) or ())
    count = 1
    for dim in site.spec.dims:
        count *= sizes[dim]
    return count


def refuse_if_over(plan: Plan, budget: int | None, device: torch.device) -> None:
    """Refuse a run that would keep more than it may.

    Raises:
        BudgetError: names the excess, and the address that takes most.
    """
    budget = current().budget if budget is None else budget
    allowed = int(0.8 * free_memory(device)) if budget is None else budget
    if plan.bytes <= allowed:
        return
    most = max([*plan.bytes_by_address, "logits"], key=lambda n: plan.bytes_by_address.get(n, plan.logits_bytes))
    raise error(
        BudgetError,
        f"this run would keep more than memory allows, most of it {most}",
        got=in_bytes(plan.bytes),
        allowed=f"{in_bytes(allowed)}, which is {in_bytes(plan.bytes - allowed)} less",
        do="name fewer sites, units or positions, use smaller batches, pass logits=False, or raise budget=",
    )


def in_bytes(count: int) -> str:
    """A number of bytes in the largest unit of which there is at least one and a half."""
    for name, unit in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= 1.5 * unit:
            return f"{count / unit:,.1f} {name}"
    return f"{count:,} B"


def free_memory(device: torch.device) -> int:
    """Free bytes of a device, with those that its allocator holds and no tensor uses."""
    backend: Any = getattr(torch, device.type, None)
    if not hasattr(backend, "mem_get_info"):  # what shares the memory of the machine
        return psutil.virtual_memory().available
    idle = backend.memory_reserved(device) - backend.memory_allocated(device)
    return int(backend.mem_get_info(device)[0]) + int(idle)

"""The work list of an attention launch, on the CPU: what it covers, what it sums to, what it depends on."""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_plans import Shape, make_batch
from torch.nn.functional import silu

from mtserve.errors import InvalidArgument
from mtserve.kernels.attention.reference import attention as reference_attention
from mtserve.kernels.attention.work import (
    BLOCK,
    FIRST_HALF_SHIFT,
    ITEM_WORDS,
    MAX_SPLITS,
    AttentionWork,
    Int32Array,
    WorkPlan,
    build_work,
    plan_work,
    sum_partial,
    work_capacity,
)

SMS, GROUP = 132, 64
ODD = [Shape(0, 0, 3), Shape(1, 5, 1), Shape(63, 64, 0), Shape(64, 0, 70), Shape(65, 100, 290), Shape(0, 0, 0),
       Shape(500, 1, 129), Shape(0, 300, 17), Shape(321, 7, 0), Shape(4100, 32, 256)]  # fmt: skip
SHAPES = st.lists(
    st.builds(Shape, st.integers(0, 3000), st.integers(0, 700), st.integers(0, 300)), min_size=0, max_size=6
)


class Planned:
    """A plan of `shapes` with its arrays; limits causal or random."""

    def __init__(self, shapes: list[Shape], *, seed: int = 0, causal: bool = True, heads: int = 4, head_dim: int = 128, **options: Any) -> None:  # fmt: skip
        rng = np.random.default_rng(seed)
        limits: list[int] = []
        self.slots: Int32Array = np.zeros((len(shapes), 4), np.int32)
        for slot, each in enumerate(shapes):
            prefix = each.cached + each.delta
            self.slots[slot] = (each.cached, each.delta, len(limits), each.delta + each.candidates)
            limits += range(each.cached + 1, prefix + 1) if causal else rng.integers(0, prefix + 1, each.delta).tolist()
            limits += [prefix] * each.candidates if causal else rng.integers(0, prefix + 1, each.candidates).tolist()
        self.limits: Int32Array = np.array(limits, np.int32)
        self.work: Int32Array = np.full((work_capacity(len(limits), len(shapes)) + 1, ITEM_WORDS), -7, np.int32)
        self.splits: Int32Array = np.full(len(limits) + 9, -7, np.int32)
        options = {"sms": SMS, "deterministic": False, **options}
        if options["deterministic"]:
            options["pieces"] = min(1, options.get("pieces", 0))
        self.plan: WorkPlan = plan_work(
            self.slots,
            self.limits,
            heads=heads,
            head_dim=head_dim,
            out_work=self.work,
            out_splits=self.splits,
            **options,
        )

    @property
    def items(self) -> Int32Array:
        return self.work[: self.plan.items]

    def half(self, slot: int, chunk: int) -> int:
        """Where the second half of a slot's chunks begins, in blocks."""
        cached, delta = self.slots[slot, :2].tolist()
        blocks = math.ceil(cached / BLOCK) + math.ceil(delta / BLOCK)
        return chunk * math.ceil(math.ceil(blocks / chunk) / 2)

    def parts(self, item: list[int], row: int) -> list[tuple[int, int, int]]:
        """(split, begin, end) of the partial sums that an item makes of one of its rows."""
        slot, first, rows, begin, end, split, _, half = item
        if not half:
            return [(split, begin, end)]
        group = first + (row - first) // GROUP * GROUP
        seen = max(self.blocks(each, slot) for each in range(group, min(group + GROUP, first + rows)))
        return [(split, begin, half), (split + 1, half, end)][: 1 + (seen > half)]

    def sums(self, slot: int) -> list[tuple[list[tuple[int, int]], list[tuple[int, int]]]]:
        """Row by row of a slot: the runs of blocks that are added in order, of either half of a deterministic plan."""
        _, _, first, count = self.slots[slot].tolist()
        rows: list[tuple[list[tuple[int, int]], list[tuple[int, int]]]] = [([], []) for _ in range(count)]
        for item in sorted(self.items.tolist(), key=lambda item: item[5]):
            if item[0] != slot:
                continue
            chunk = item[6]
            for row in range(item[1], item[1] + item[2]):
                seen = self.blocks(row, slot)
                for _, begin, end in self.parts(item, row):
                    cuts = [(at, min(at + chunk, end, seen)) for at in range(begin, end, chunk) if at < seen]
                    rows[row - first][begin >= self.half(slot, chunk)].extend(cuts)
        return rows

    def blocks(self, row: int, slot: int) -> int:
        cached, limit = int(self.slots[slot, 0]), int(self.limits[row])
        pages = -(-cached // BLOCK)
        return -(-limit // BLOCK) if limit <= cached else pages + -(-(limit - cached) // BLOCK)


def check_cover(planned: Planned, deterministic: bool = False) -> None:
    """Every row meets each of its blocks once, in runs numbered 0 .. splits - 1; what is behind is left alone."""
    assert (planned.work[planned.plan.items :] == -7).all()
    assert (planned.splits[len(planned.limits) :] == 0).all()
    counts, firsts = planned.splits & 0xFFFF, planned.splits >> FIRST_HALF_SHIFT
    assert planned.plan.max_splits == max(1, counts.max(initial=0)) <= MAX_SPLITS
    runs: dict[int, list[tuple[int, int, int]]] = {}
    for item in planned.items.tolist():
        slot, row, rows, begin, end, _, chunk, half = item
        _, _, first, count = planned.slots[slot].tolist()
        if deterministic:
            assert chunk > 0 and begin % chunk == 0
            assert half == 0 or (half == planned.half(slot, chunk) and begin <= half < end)
        else:
            assert chunk == half == 0
        assert (row - first) % planned.plan.tile_rows == 0
        assert rows == min(planned.plan.tile_rows, first + count - row)
        for each in range(row, row + rows):
            runs.setdefault(each, []).extend(planned.parts(item, each))
            if deterministic:
                assert firsts[each] >= 1
                assert all((split < firsts[each]) == (begin < planned.half(slot, chunk) or end == 0)
                           for split, begin, end in planned.parts(item, each))  # fmt: skip
    assert sorted(runs) == list(range(len(planned.limits)))
    owner = np.repeat(np.arange(len(planned.slots)), planned.slots[:, 3])
    for row, parts in runs.items():
        parts.sort()
        assert [split for split, _, _ in parts] == list(range(counts[row]))
        assert parts[0][1] == 0
        assert all(before[2] == after[1] for before, after in pairwise(parts))
        assert all(begin < end or len(parts) == 1 for _, begin, end in parts)
        assert parts[-1][2] >= planned.blocks(row, int(owner[row]))
    for slot, row, rows, *_ in planned.items.tolist():
        seen = max(planned.blocks(each, slot) for each in range(row, row + rows))
        assert max(end for each in range(row, row + rows) for _, _, end in runs[each]) == seen


@given(
    shapes=SHAPES, causal=st.booleans(), deterministic=st.booleans(), heads=st.sampled_from([1, 2, 4, 8, 200]),
    head_dim=st.sampled_from([32, 64, 128, 256]), sms=st.sampled_from([1, 78, 132]),
    pieces=st.integers(0, MAX_SPLITS), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_every_row_meets_every_block_once(shapes: list[Shape], seed: int, **options: Any) -> None:
    check_cover(Planned(shapes, seed=seed, **options), options["deterministic"])


@pytest.mark.parametrize(
    "options", [{}, {"deterministic": True}, {"pieces": 3}, {"pieces": 16, "tile_rows": 128}], ids=str
)
def test_odd_shapes(options: dict[str, Any]) -> None:
    for causal in (True, False):
        check_cover(Planned(ODD, causal=causal, **options), "deterministic" in options)
    check_cover(Planned([], **options))
    check_cover(Planned([Shape(0, 0, 0)] * 3, **options))


@pytest.mark.parametrize("mask", ["causal", "full", "random"])
@pytest.mark.parametrize("options", [{}, {"deterministic": True}, {"pieces": 2}, {"pieces": 16}], ids=str)
def test_the_list_sums_to_the_reference(mask: str, options: dict[str, Any]) -> None:
    heads, head_dim, n = 2, 32, 7
    shapes = [Shape(130, 70, 200), Shape(0, 0, 3), Shape(200, 0, 9), Shape(0, 140, 1), Shape(64, 1, 0)]
    batch = make_batch(shapes, mask=mask, page_tokens=BLOCK, heads=heads, head_dim=head_dim, seed=4)
    plan = batch.plan
    slots = np.stack([plan.cached, plan.delta, plan.row_offsets[:-1], np.diff(plan.row_offsets)], axis=1)
    work, planned = build_work(
        slots.astype(np.int32), plan.limit.numpy(), plan.page_table, heads=heads, head_dim=head_dim, sms=SMS,
        device=torch.device("cpu"), **options,
    )  # fmt: skip
    partial = torch.full((planned.max_splits, plan.rows, heads, head_dim), float("nan"))
    for item in work.work[: planned.items].tolist():
        _execute(item, batch, work, partial, n)
    got = sum_partial(partial.flatten(2), work.splits, halves="deterministic" in options).view(partial[0].shape)
    expected = reference_attention(batch.q, batch.k, batch.v, batch.pages, plan, n)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def _execute(item: list[int], batch: Any, work: AttentionWork, partial: torch.Tensor, n: int) -> None:
    """What a thread block does with one item, all heads at once."""
    slot, row, rows, begin, end, split, _, half = item
    if half:
        _execute([slot, row, rows, begin, half, split, 0, 0], batch, work, partial, n)
        _execute([slot, row, rows, half, end, split + 1, 0, 0], batch, work, partial, n)
        return
    cached, delta, first, _ = work.slots[slot].tolist()
    pages, alpha = -(-cached // BLOCK), batch.q.shape[-1] ** -0.5
    for each in range(row, row + rows):
        total = torch.zeros_like(batch.q[each])
        for block in range(begin, end):
            if block < pages:
                base, valid = block * BLOCK, cached - block * BLOCK
                k, v = batch.pages[int(work.page_table[slot, block])]
            else:
                at = (block - pages) * BLOCK
                base, valid = cached + at, delta - at
                k, v = batch.k[first + at : first + at + BLOCK], batch.v[first + at : first + at + BLOCK]
            seen = max(0, min(BLOCK, valid, int(work.limit[each]) - base))
            weights = silu(alpha * torch.einsum("hd,nhd->nh", batch.q[each], k[:seen])) / n
            total += torch.einsum("nh,nhd->hd", weights, v[:seen])
        if split == 0 and each >= first + delta:
            weight = silu(alpha * (batch.q[each] * batch.k[each]).sum(-1, keepdim=True)) / n
            total += weight * batch.v[each]
        partial[split, each] = total


@given(
    shapes=SHAPES.filter(bool), before=SHAPES, pieces=st.sampled_from([0, 1]), tile_rows=st.sampled_from([0, 128, 192]),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_deterministic_sums_of_a_slot_do_not_depend_on_its_company(
    shapes: list[Shape], before: list[Shape], pieces: int, tile_rows: int, seed: int
) -> None:
    alone = Planned(shapes[:1], deterministic=True)
    among = Planned([*before, *shapes], seed=seed, deterministic=True, pieces=pieces, tile_rows=tile_rows)
    assert among.sums(len(before)) == alone.sums(0)


def test_a_lone_slot_is_cut_at_every_chunk_and_a_full_chip_at_none() -> None:
    assert Planned([Shape(4096, 32, 256)], deterministic=True).plan.max_splits >= 8
    assert Planned([Shape(8192, 32, 256)] * 32, deterministic=True).plan.items == 64  # tiles of 192 and 96 rows


def test_the_same_lengths_give_the_same_plan() -> None:
    once, again = Planned(ODD), Planned(ODD)
    assert once.plan == again.plan
    assert (once.work == again.work).all()


def test_few_long_prefixes_are_cut_and_many_are_not() -> None:
    """Where one slot's tiles leave most of the chip idle, keys are cut; where tiles abound, outputs are direct."""
    assert Planned([Shape(4096, 32, 256)]).plan.max_splits >= 8
    assert Planned([Shape(4096, 32, 256)] * 8).plan.max_splits >= 2
    assert Planned([Shape(0, 8192, 256)] * 32).plan.max_splits == 1
    assert Planned([Shape(8192, 32, 256)] * 32).plan.tile_rows == 192


BROKEN: list[tuple[str, dict[str, Any]]] = [
    ("heads", {"heads": 0}),
    ("head_dim", {"head_dim": 96}),
    ("sms", {"sms": 0}),
    ("pieces", {"pieces": MAX_SPLITS + 1}),
    ("pieces", {"pieces": 2, "deterministic": True}),
    ("tile_rows", {"tile_rows": 64}),
    ("tile_rows", {"tile_rows": 192, "head_dim": 256}),
    ("limits", {"limits": np.zeros(9, np.int32)}),
    ("limits", {"limits": np.full(10, 31, np.int32)}),
    ("limits", {"limits": np.full(10, -1, np.int32)}),
    ("limits", {"limits": np.zeros(10, np.int64)}),
    (r"slots\[0\]", {"slots": np.array([[-1, 1, 0, 10]], np.int32)}),
    (r"slots\[0\]", {"slots": np.array([[2**24, 1, 0, 10]], np.int32)}),
    (r"slots\[0\]", {"slots": np.array([[0, 11, 0, 10]], np.int32)}),
    (r"slots\[1\]", {"slots": np.array([[20, 10, 0, 10], [0, 0, 9, 0]], np.int32)}),
    ("slots", {"slots": np.zeros((1, 5), np.int32)}),
    ("out_work", {"out_work": np.zeros((0, ITEM_WORDS), np.int32)}),
    ("out_work", {"out_work": np.zeros((8, ITEM_WORDS + 1), np.int32)}),
    ("out_splits", {"out_splits": np.zeros(9, np.int32)}),
]


@pytest.mark.parametrize(("field", "change"), BROKEN)
def test_what_is_malformed_is_named(field: str, change: dict[str, Any]) -> None:
    good: dict[str, Any] = {
        "slots": np.array([[20, 10, 0, 10]], np.int32), "limits": np.full(10, 30, np.int32), "heads": 2, "head_dim": 64,
        "sms": SMS, "deterministic": False, "out_work": np.zeros((16, ITEM_WORDS), np.int32),
        "out_splits": np.zeros(10, np.int32),
    }  # fmt: skip
    assert plan_work(**good).items >= 1
    with pytest.raises(InvalidArgument, match=f"^{field}: "):
        plan_work(**{**good, **change})


def test_work_tensors_are_checked() -> None:
    def empty(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32)

    good = {"slots": empty(2, 4), "page_table": empty(2, 3), "limit": empty(5), "work": empty(9, 8), "count": empty(1),
            "splits": empty(5)}  # fmt: skip
    AttentionWork(**good, tile_rows=128)
    for name, broken in {"slots": empty(2, 3), "count": empty(2), "limit": empty(5).long()}.items():
        with pytest.raises(InvalidArgument, match=f"^{name}: "):
            AttentionWork(**{**good, name: broken}, tile_rows=128)


def test_the_cuda_text_is_found_and_the_cache_folder_follows_its_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from mtserve.kernels.cuda import build

    for name in ("hstu_attention", "product"):
        text = build.source(name)
        assert f"{name}(" in text
        assert text.count("void barrier_wait(") == 1  # of the header, put in its place
        assert "#include" not in text
    with pytest.raises(build.BuildFailed, match=r"nowhere\.cu"):
        build.source("nowhere")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.cache_folder() == tmp_path / "mtserve" / "cubin"


def test_the_build_keeps_what_it_built_and_names_what_failed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A stand-in for nvcc, which writes its options into the cubin."""
    from mtserve.kernels.cuda import build

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    calls, nvcc = tmp_path / "calls", tmp_path / "nvcc"
    nvcc.write_text(
        f"#!{sys.executable}\nimport sys, pathlib\n"
        f"if '--version' in sys.argv: sys.exit(print('13.0'))\n"
        f"if '-DBAD=1' in sys.argv: sys.exit('no such macro')\n"
        f"open({str(calls)!r}, 'a').write('built ')\n"
        "pathlib.Path(sys.argv[sys.argv.index('-o') + 1]).write_text(' '.join(sys.argv))\n"
    )
    nvcc.chmod(0o755)
    assert subprocess.run(["nvcc", "--version"], capture_output=True, check=True).stdout == b"13.0\n"
    first = build.build("hstu_attention", {"HEAD_DIM": 64})
    assert build.build("hstu_attention", {"HEAD_DIM": 64}) == first
    assert build.build("hstu_attention", {"HEAD_DIM": 32}) != first
    assert calls.read_text() == "built built "
    assert len(list(build.cache_folder().iterdir())) == 2
    with pytest.raises(build.BuildFailed, match=r"^nvcc: .*no such macro"):
        build.build("hstu_attention", {"BAD": 1})

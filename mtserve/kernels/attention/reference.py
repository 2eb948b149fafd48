"""HSTU attention, the truth: one row at a time, fp32.

    y_i = sum over visible j of SiLU(alpha * q_i . k_j) / n * v_j,   alpha = 1 / sqrt(head_dim)

(Zhai et al., "Actions Speak Louder than Words", 2024; n is a constant here, see ModelConfig.)
"""

from __future__ import annotations

import torch

from mtserve.kernels.plan import KernelPlan


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor | None, plan: KernelPlan, n: int
) -> torch.Tensor:
    """[T, H, D] outputs of new rows `q`, `k`, `v` [T, H, D] over pages [pages, 2, page_tokens, H, D] and each other.

    Pages have the rows' type or fp8.
    """
    out = torch.zeros(q.shape, dtype=torch.float32)
    q, k, v = q.float().cpu(), k.float().cpu(), v.float().cpu()
    alpha = q.shape[-1] ** -0.5
    for slot, (begin, end) in enumerate(zip(plan.row_offsets, plan.row_offsets[1:], strict=False)):
        keys, values = [], []
        for token in range(plan.cached[slot]):
            assert pages is not None
            page = pages[plan.page_table[slot, token // plan.page_tokens], :, token % plan.page_tokens].float().cpu()
            keys.append(page[0])
            values.append(page[1])
        for row in range(begin, begin + plan.delta[slot]):
            keys.append(k[row])
            values.append(v[row])
        for row in range(begin, end):
            limit = int(plan.limit[row])
            own = [row] if row >= begin + plan.delta[slot] else []
            row_keys = torch.stack([*keys[:limit], *(k[r] for r in own)])
            row_values = torch.stack([*values[:limit], *(v[r] for r in own)])
            logits = alpha * torch.einsum("hd,nhd->nh", q[row], row_keys)
            out[row] = torch.einsum("nh,nhd->hd", logits * torch.sigmoid(logits) / n, row_values)
    return out

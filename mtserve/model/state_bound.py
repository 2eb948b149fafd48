"""How large K and V of a model can be, whatever its input: what its weights alone say."""

from __future__ import annotations

import torch

from mtserve.model.hstu import HSTULayer
from mtserve.model.ranking import RankingModel

_K, _V = 3, 1  # of the columns u, v, q, k


@torch.inference_mode()
def state_bound(model: RankingModel) -> float:
    """What no magnitude of K or V in any layer is above, but for rounding.

    A layer's norm gives rows w * x + b with |x|_2 <= sqrt(d), w and b those of the token's group. So, by Cauchy and
    Schwarz, column j of the product that follows is at most sqrt(d) |w * W_j|_2 + |b . W_j + bias_j|, and SiLU makes no
    magnitude larger. About sqrt(d) / 3 times what normal rows reach.
    """
    return max(_layer_bound(layer) for layer in model.layers if isinstance(layer, HSTULayer))


def _layer_bound(layer: HSTULayer) -> float:
    parts, biases = layer.uvqk_weight.float().chunk(4, -1), layer.uvqk_bias.float().chunk(4)
    weight, bias = torch.cat((parts[_V], parts[_K]), -1), torch.cat((biases[_V], biases[_K]))
    scale, shift = layer.norm_weight.float(), layer.norm_bias.float()
    # [groups, columns], the squares of |w * W_j|_2.
    spread = (scale.square() @ weight.square()).sqrt() * len(weight) ** 0.5
    return float((spread + (shift @ weight + bias).abs()).max())

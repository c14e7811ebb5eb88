"""The whole network once more, in plain torch.

A second, slow and literal statement of what a checkpoint computes, for `verify --logits` to compare
with. Weights are asked for by checkpoint name when they are used, and dropped: a matrix or two are
in memory at a time, however large the model. Where they come from is in torch_weights.py.

Shapes: B batch, T position, D hidden, V vocab, N heads, H head dim, R rope dim, K experts of a
token, S tokens (B and T flattened). Sources: DeepSeek-V3 technical report (arXiv 2412.19437)
section 2, YaRN (arXiv 2309.00071); what the report leaves open is as vLLM and SGLang serve it.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mtp_model.problems import UserError

try:
    import torch
    from torch import Tensor
    from torch.nn import functional

    from converters.verifying.logits.torch_config import Config, as_read
    from converters.verifying.logits.torch_weights import Get, weights_of
except ImportError as error:
    raise UserError("needs torch, safetensors: pip install 'deepseek-mtp[verify]'") from error

DROPPED_GROUP = -math.inf  # what an expert outside the kept groups scores; 0 would beat negatives


class LastStates(NamedTuple):
    """The main model's last states [B, T, D]: after `model.norm`, and before it."""

    hidden: Tensor
    before_norm: Tensor


class Places(NamedTuple):
    """What attention needs to know of the positions of a batch."""

    cos: Tensor  # [T, R/2], times the YaRN multiplier
    sin: Tensor  # [T, R/2]
    interleave: bool
    visible: Tensor  # bool [B, 1, T, T]: query row may see key column


class TorchReference:
    """DeepSeek-V3 with its MTP modules, from config.json's content and weights fetched by name.

    `get(name)` returns a weight already dequantised. `dtype` float64 tells rounding from error.
    Raises UserError for a key of the config that is not computed.
    """

    def __init__(self, config: Config, get: Get, dtype: torch.dtype = torch.float32):
        self.config = config
        self.as_read = as_read(config)
        self.dtype = dtype
        self.get: Get = lambda name: get(name).to(dtype)

    @torch.no_grad()
    def main(self, tokens: Tensor, segment_ids: Tensor | None = None) -> LastStates:
        """Run the main model on int [B, T]; documents (equal segment ids) see only themselves."""
        segment_ids = torch.ones_like(tokens) if segment_ids is None else segment_ids
        places = self.places(segment_ids)
        x = self.embed(tokens)
        for layer in range(self.as_read["num_hidden_layers"]):
            x = self.layer(layer, x, places)
        return LastStates(self.norm(x), x)

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """Return the embedding [B, T, D] of int [B, T]."""
        return self.get("model.embed_tokens.weight")[tokens]

    @torch.no_grad()
    def layer(self, index: int, x: Tensor, places: Places) -> Tensor:
        """Return the residual stream [B, T, D] after one layer of the main model."""
        is_moe = index >= self.as_read["first_k_dense_replace"]
        get = under(self.get, f"model.layers.{index}")
        return decoder_layer(x, get, self.as_read, places, is_moe=is_moe)

    @torch.no_grad()
    def norm(self, x: Tensor) -> Tensor:
        """Apply `model.norm`."""
        return rms_norm(x, self.get("model.norm.weight"), self.as_read["rms_norm_eps"])

    @torch.no_grad()
    def module(self, index: int, h: Tensor, e: Tensor, places: Places) -> Tensor:
        """Return h_k [B, T, D] of one MTP module, from h_{k-1} and the embedding of t[i+k]."""
        get = under(self.get, f"model.layers.{self.as_read['num_hidden_layers'] + index}")
        return mtp_output(mtp_input(h, e, get, self.as_read), get, self.as_read, places)

    def first_state(self, states: LastStates) -> Tensor:
        """Return h_0, the state that depth 1 is fed, as the config's `mtp_hidden_state` says."""
        kinds = {"post_norm": states.hidden, "pre_norm": states.before_norm}
        return kinds[self.as_read["mtp_hidden_state"]]

    @torch.no_grad()
    def mtp(
        self,
        h0: Tensor,
        tokens: Tensor,
        segment_ids: Tensor | None = None,
        depths: int | None = None,
    ) -> list[Tensor]:
        """Return h_1..h_depths [B, T, D]; row i of h_k gives the logits of token i+k+1.

        Depth k is fed token i+k, or token 0 where that is another document's or past the end.
        Default: one depth a module. More depths than modules reuse the modules in turn: then a
        module has seen the document as far as row i in its first use, and goes on from there.
        """
        num_modules = self.as_read["num_nextn_predict_layers"]
        if depths and not num_modules:
            raise ValueError(f"the config has no MTP module, but {depths} depths are asked for")
        segment_ids = torch.ones_like(tokens) if segment_ids is None else segment_ids
        uses: list[list[Tensor]] = [[] for _ in range(num_modules)]  # what each was fed
        states = [h0]
        for k in range(1, 1 + (num_modules if depths is None else depths)):
            module = (k - 1) % num_modules
            e = self.get("model.embed_tokens.weight")[tokens_ahead(tokens, segment_ids, k)]
            get = under(self.get, f"model.layers.{self.as_read['num_hidden_layers'] + module}")
            uses[module].append(mtp_input(states[-1], e, get, self.as_read))
            run = self._first_use if k <= num_modules else self._later_use
            states.append(run(uses[module], get, segment_ids))
        return states[1:]

    def _first_use(self, uses: list[Tensor], get: Get, segment_ids: Tensor) -> Tensor:
        return mtp_output(uses[0], get, self.as_read, self.places(segment_ids))

    def _later_use(self, uses: list[Tensor], get: Get, segment_ids: Tensor) -> Tensor:
        """Row by row: the module runs over its document as far as row i, then its own chain.

        The chain's inputs stand where the depths that they are of draft: each module is used once
        in as many depths as there are modules.
        """
        out = torch.zeros_like(uses[0])
        count = self.as_read["num_nextn_predict_layers"]
        steps = torch.arange(len(uses) - 1) * count + count
        for row, i in torch.cartesian_prod(*map(torch.arange, segment_ids.shape)).tolist():
            start = int((segment_ids[row] == segment_ids[row, i]).nonzero()[0])
            text, chain = uses[0][row, start : i + 1], [use[row, i : i + 1] for use in uses[1:]]
            x = torch.cat([text, *chain])[None]
            positions = torch.cat([torch.arange(start, i + 1), i + steps])
            places = self.places(torch.ones(1, x.shape[1]), positions)
            out[row, i] = mtp_output(x, get, self.as_read, places)[0, -1]
        return out

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return [B, T, V] from a normed state: `main(...).hidden` or one of `mtp(...)`."""
        return functional.linear(hidden, self.get("lm_head.weight"))

    def places(self, segment_ids: Tensor, positions: Tensor | None = None) -> Places:
        """Positions [T] count from 0 in a row unless given."""
        positions = torch.arange(segment_ids.shape[1]) if positions is None else positions
        same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
        rope, dim = self.as_read["rope"], self.as_read["qk_rope_head_dim"]
        cos, sin = rope_table(rope, dim, positions, self.dtype)
        return Places(cos, sin, rope["interleave"], visible=same.tril())


class TorchParts:
    """The reference part by part on one batch, for who compares it with another: numpy in and out.

    A part is asked for its output from the state before it; nothing is remembered between two.
    """

    def __init__(self, reference: TorchReference, tokens: np.ndarray, segment_ids: np.ndarray):
        self._reference = reference
        self._tokens, self._segments = torch.as_tensor(tokens).long(), torch.as_tensor(segment_ids)
        self._places = reference.places(self._segments)

    def embed(self) -> np.ndarray:
        return self._reference.embed(self._tokens).numpy()

    def layer(self, index: int, x: np.ndarray) -> np.ndarray:
        return self._reference.layer(index, torch.from_numpy(x), self._places).numpy()

    def norm(self, x: np.ndarray) -> np.ndarray:
        return self._reference.norm(torch.from_numpy(x)).numpy()

    def module(self, index: int, h: np.ndarray) -> np.ndarray:
        e = self._reference.embed(tokens_ahead(self._tokens, self._segments, index + 1))
        return self._reference.module(index, torch.from_numpy(h), e, self._places).numpy()

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        return self._reference.logits(torch.from_numpy(hidden)).numpy()


def under(get: Get, prefix: str) -> Get:
    """Return `get` for the names below one module."""
    return lambda name: get(f"{prefix}.{name}")


def tokens_ahead(tokens: Tensor, segment_ids: Tensor, k: int) -> Tensor:
    """Return t[i+k] at i, and 0 where i+k is past the end or in another document. [B, T]"""
    ahead = torch.zeros_like(tokens)
    same = segment_ids[:, k:] == segment_ids[:, :-k]
    ahead[:, :-k] = tokens[:, k:] * same
    return ahead


def mtp_input(h: Tensor, e: Tensor, get: Get, config: Config) -> Tensor:
    """Return what the layer of depth k reads, from h_{k-1} and the embedding of token i+k."""
    eps = config["rms_norm_eps"]
    # Embedding first: equation 21 of the report prints the reverse, the weights need this order.
    pair = [rms_norm(e, get("enorm.weight"), eps), rms_norm(h, get("hnorm.weight"), eps)]
    return functional.linear(torch.cat(pair, dim=-1), get("eh_proj.weight"))


def mtp_output(x: Tensor, get: Get, config: Config, places: Places) -> Tensor:
    """Return h_k [B, T, D] from `mtp_input`."""
    y = decoder_layer(x, get, config, places, is_moe=True)
    return rms_norm(y, get("shared_head.norm.weight"), config["rms_norm_eps"])


def decoder_layer(x: Tensor, get: Get, config: Config, places: Places, *, is_moe: bool) -> Tensor:
    """Apply one pre-norm layer to [B, T, D]."""
    eps = config["rms_norm_eps"]
    a = rms_norm(x, get("input_layernorm.weight"), eps)
    x = x + attention(a, under(get, "self_attn"), config, places)
    m = rms_norm(x, get("post_attention_layernorm.weight"), eps)
    return x + (moe(m, under(get, "mlp"), config) if is_moe else mlp(m, under(get, "mlp")))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rope_frequencies(rope: Config, dim: int) -> Tensor:
    """Return the angle per position of each pair, float64 [R/2], with YaRN's ramp if configured.

    Pairs that turn over beta_fast times within the original length keep their frequency, those
    below beta_slow times have it divided by `factor`; between lies a linear ramp.
    """
    theta, yarn = rope["theta"], rope["yarn"]
    pair = torch.arange(dim // 2, dtype=torch.float64)
    frequency = theta ** (-2 * pair / dim)
    if yarn is None:
        return frequency

    def pair_that_turns(times: float) -> float:
        return dim * math.log(yarn["original"] / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(yarn["beta_fast"]), pair_that_turns(yarn["beta_slow"])
    if yarn["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    slowed = ((pair - low) / (high - low)).clamp(0, 1)
    return frequency * (1 - slowed) + frequency / yarn["factor"] * slowed


def rope_table(
    rope: Config, dim: int, positions: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return cos and sin [T, R/2] of positions [T], times YaRN's multiplier."""
    angles = positions.double()[:, None] * rope_frequencies(rope, dim)
    multiplier = rope["yarn"]["multiplier"] if rope["yarn"] else 1.0
    return (angles.cos() * multiplier).to(dtype), (angles.sin() * multiplier).to(dtype)


def rotate(x: Tensor, places: Places) -> Tensor:
    """Rotate the pairs of [B, N, T, R]: neighbours (x[2i], x[2i+1]), or (x[i], x[i + R/2])."""
    cos, sin = places.cos, places.sin
    if not places.interleave:
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def attention(x: Tensor, get: Get, config: Config, places: Places) -> Tensor:
    """Multi-head latent attention of [B, T, D]."""
    nope, rope, v_dim = (config[f"{k}_head_dim"] for k in ("qk_nope", "qk_rope", "v"))
    q_nope, q_rope = heads(queries(x, get, config), config).split([nope, rope], dim=-1)
    kv_a = functional.linear(x, get("kv_a_proj_with_mqa.weight"))
    latent, k_rope = kv_a.split([config["kv_lora_rank"], rope], dim=-1)
    latent = rms_norm(latent, get("kv_a_layernorm.weight"), config["rms_norm_eps"])
    kv = heads(functional.linear(latent, get("kv_b_proj.weight")), config)
    k_nope, v = kv.split([nope, v_dim], dim=-1)
    # One rotary key serves all heads; it is not normalised.
    scores = rotate(q_rope, places) @ rotate(k_rope[:, None], places).mT + q_nope @ k_nope.mT
    yarn = config["rope"]["yarn"]
    scale = (nope + rope) ** -0.5 * (yarn["m"] ** 2 if yarn else 1.0)
    weights = (scores * scale).masked_fill(~places.visible, -math.inf).softmax(dim=-1)
    return functional.linear((weights @ v).transpose(1, 2).flatten(2), get("o_proj.weight"))


def queries(x: Tensor, get: Get, config: Config) -> Tensor:
    """Return [B, T, N*H], through the low-rank pair unless q_lora_rank is null."""
    if config.get("q_lora_rank") is None:
        return functional.linear(x, get("q_proj.weight"))
    q_a = functional.linear(x, get("q_a_proj.weight"))
    q_a = rms_norm(q_a, get("q_a_layernorm.weight"), config["rms_norm_eps"])
    return functional.linear(q_a, get("q_b_proj.weight"))


def heads(x: Tensor, config: Config) -> Tensor:
    """[B, T, N*H] -> [B, N, T, H]"""
    return x.unflatten(-1, (config["num_attention_heads"], -1)).transpose(1, 2)


def mlp(x: Tensor, get: Get) -> Tensor:
    """SwiGLU of [..., D]: a dense layer's, an expert's or the shared experts'."""
    gate = functional.silu(functional.linear(x, get("gate_proj.weight")))
    up = functional.linear(x, get("up_proj.weight"))
    return functional.linear(gate * up, get("down_proj.weight"))


def route(x: Tensor, gate: Tensor, bias: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Return each token's experts int [S, K] and their weights [S, K] for x [S, D].

    The bias chooses and does not weigh. Only experts of the topk_group groups are eligible whose
    two best have the highest sums.
    """
    scores = functional.linear(x, gate).sigmoid()
    biased = (scores + bias).unflatten(-1, (config["n_group"], -1))
    group_scores = biased.topk(2, dim=-1).values.sum(-1)
    kept = torch.zeros_like(group_scores, dtype=torch.bool)
    kept.scatter_(-1, group_scores.topk(config["topk_group"], dim=-1).indices, True)
    eligible = biased.masked_fill(~kept[..., None], DROPPED_GROUP).flatten(-2)
    experts = eligible.topk(config["num_experts_per_tok"], dim=-1).indices
    weights = scores.gather(-1, experts)
    if config["norm_topk_prob"]:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return experts, weights * config["routed_scaling_factor"]


def moe(x: Tensor, get: Get, config: Config) -> Tensor:
    """Apply routed and shared experts to [B, T, D]; only experts that are chosen are fetched."""
    x_SD = x.flatten(0, -2)
    gate, bias = get("gate.weight"), get("gate.e_score_correction_bias")
    experts, weights = route(x_SD, gate, bias, config)
    y_SD = mlp(x_SD, under(get, "shared_experts"))
    for expert in experts.unique().tolist():
        row, place = torch.where(experts == expert)
        part = mlp(x_SD[row], under(get, f"experts.{expert}"))
        y_SD.index_add_(0, row, part * weights[row, place, None])
    return y_SD.view_as(x)


def open_reference(folder: str | Path, dtype: torch.dtype = torch.float32) -> TorchReference:
    """Return the reference of a local safetensors checkpoint; reads one tensor when it is used."""
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return TorchReference(config, weights_of(folder, config), dtype)

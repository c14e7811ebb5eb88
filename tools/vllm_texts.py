"""What vLLM writes behind prompts, and in which rounds; run by the Python that has vLLM.

    python -P tools/vllm_texts.py < job.json     # a `Job` as JSON; the result is the last line

It imports nothing of ours, so that vLLM may live in an environment of its own. All runs in one
process, a step of the engine at a time: what a request gets in one step is what one round brought.
"""

import dataclasses
import importlib
import json
import os
import sys
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What vLLM is asked for."""

    model: str  # folder of the whole checkpoint
    prompts: list[list[int]]
    most: list[int]  # tokens behind each prompt; no token ends a text before
    drafts: int = 0  # tokens that the MTP module drafts a round; 0 for none
    draft_model: str | None = None  # folder of the module alone
    temperature: float = 0.0
    probabilistic: bool = False  # drafts are sampled, not the likeliest tokens
    keep_first_embedding: bool = False  # see `keep_first_embedding` below
    seed: int = 0


def main() -> None:
    # Read by vLLM as it is imported. One process, so that the patch below is where the model is;
    # no core of its own and one thread, since others may compute here and the model is small.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    print("\n" + json.dumps(write(Job(**json.load(sys.stdin)))))


def write(job: Job) -> dict[str, Any]:
    """Texts by rounds, and what vLLM counted itself.

    texts: of each prompt, a list of rounds, each a list of tokens. The first is the token that
    comes with the prompt, before any draft. mended: by `mend_temperatures`.
    """
    vllm = importlib.import_module("vllm")
    if job.keep_first_embedding:
        keep_first_embedding()
    on_cpu = importlib.import_module("vllm.platforms").current_platform.is_cpu()
    if on_cpu:
        attend_any_size()
    # On CPUs with AMX vLLM prefers a kernel that takes bfloat16 only (0.32.0).
    backend = {"attention_backend": "CPU_MLA"} if on_cpu else {}
    speculative: dict[str, Any] | None = None
    if job.drafts:
        speculative = {"method": "mtp", "num_speculative_tokens": job.drafts, **backend}
        speculative |= {"draft_sample_method": "probabilistic"} if job.probabilistic else {}
        speculative |= {"model": job.draft_model} if job.draft_model else {}
    lengths = [len(p) + most for p, most in zip(job.prompts, job.most, strict=True)]
    llm = vllm.LLM(
        job.model,
        dtype="float32",
        max_model_len=max(lengths) + job.drafts + 1,
        max_num_seqs=1,  # of several at a time, drafts are lost where one ends (0.32.0)
        enforce_eager=True,
        speculative_config=speculative,
        disable_log_stats=False,
        skip_tokenizer_init=True,
        seed=job.seed,
        **backend,
    )
    mended = on_cpu and bool(job.temperature) and mend_temperatures()  # of what loading chose
    kind = importlib.import_module("vllm.sampling_params").RequestOutputKind.DELTA
    for number, (prompt, most) in enumerate(zip(job.prompts, job.most, strict=True)):
        asked = {"temperature": job.temperature, "max_tokens": most, "seed": job.seed + number}
        how = vllm.SamplingParams(**asked, ignore_eos=True, detokenize=False, output_kind=kind)
        llm.llm_engine.add_request(str(number), {"prompt_token_ids": prompt}, how)
    texts: list[list[list[int]]] = [[] for _ in job.prompts]
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            if output.outputs[0].token_ids:
                number = int(output.request_id.partition("-")[0])
                texts[number].append(list(output.outputs[0].token_ids))
    counts = counted(llm.get_metrics())
    return {"version": vllm.__version__, "texts": texts, "counted": counts, "mended": mended}


def counted(metrics: list[Any]) -> dict[str, Any]:
    """vLLM's own counters of speculative decoding, by the end of their names."""
    begin = "vllm:spec_decode_"
    found = {each.name: each for each in metrics if each.name.startswith(begin)}
    return {
        name.removeprefix(begin): getattr(each, "values", None) or each.value
        for name, each in found.items()
        if hasattr(each, "value") or hasattr(each, "values")
    }


def keep_first_embedding() -> None:
    """Let the MTP module see the embedding in row 0 of a text, which vLLM sets to zero.

    It does so where the position is 0. Rotary embeddings tell distances only, so positions that
    begin at 1 change nothing else.
    """
    name = "vllm.model_executor.models.deepseek_mtp"
    layer: Any = importlib.import_module(name).DeepSeekMultiTokenPredictorLayer
    forward = layer.forward

    def moved(self: Any, input_ids: Any, positions: Any, *others: Any) -> Any:
        return forward(self, input_ids, positions + 1, *others)

    layer.forward = moved


def attend_any_size() -> None:
    """Let the CPU decode latents of any size: its kernel knows DeepSeek-V3's 512 + 64 only."""
    torch: Any = importlib.import_module("torch")
    name = "vllm.v1.attention.backends.mla.cpu_mla"
    implementation: Any = importlib.import_module(name).CPUMLAImpl
    kernel = implementation.forward_mqa

    def attend(self: Any, q: Any, cache: Any, metadata: Any, layer: Any) -> tuple[Any, None]:
        if self.kv_lora_rank + self.qk_rope_head_dim == 576:
            return kernel(self, q, cache, metadata, layer)
        q_BNC = torch.cat(q, dim=-1) if isinstance(q, tuple) else q
        tables, lengths = metadata.decode.block_table, metadata.decode.seq_lens
        found = []
        for q_NC, table, length in zip(q_BNC, tables, lengths.tolist(), strict=True):
            pages = table[: -(-length // cache.shape[1])].long()
            rows_TC = cache[pages].reshape(-1, cache.shape[-1])[:length]
            weights_NT = torch.softmax(q_NC @ rows_TC.T * self.scale, dim=-1)
            found.append(weights_NT @ rows_TC[:, : self.kv_lora_rank])
        return torch.stack(found), None

    implementation.forward_mqa = attend
    common: Any = importlib.import_module("vllm.model_executor.layers.attention.mla_attention")
    common.MLACommonBackend.supports_head_size = classmethod(lambda cls, head_size: True)  # noqa: ARG005


def mend_temperatures() -> bool:
    """Whether this vLLM samples with temperatures that nobody gave; from then on it does not.

    On CPUs the function that repeats a request's temperature for each of its drafts returns memory
    that was never written (vllm-project/vllm issue 55005, open at 0.32.0).
    """
    torch: Any = importlib.import_module("torch")
    sampler: Any = importlib.import_module("vllm.v1.sample.rejection_sampler")

    def repeated(x: Any, cu: Any, num_tokens: int, replace_from: int = 0, replace_to: int = 0):
        counts = torch.diff(cu, prepend=cu.new_zeros(1))
        x = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
        return torch.repeat_interleave(x, counts, output_size=num_tokens)

    given, cu = torch.tensor([0.5, 2.0]), torch.tensor([1, 3], dtype=torch.int32)
    if torch.equal(sampler.expand_batch_to_tokens(given, cu, 3), repeated(given, cu, 3)):
        return False
    sampler.expand_batch_to_tokens = repeated
    return True


if __name__ == "__main__":
    main()

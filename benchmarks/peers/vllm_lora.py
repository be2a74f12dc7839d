"""vLLM multi-LoRA, offline and in-process, every request with an adapter of its own. Runs in vLLM's own virtual environment.

`lora_target_modules` is set to what the adapters change: its fair configuration, twice as fast as the default.
"""

from __future__ import annotations

import json

import torch
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from peers.worker import Job, Round, serve


def build(job: Job) -> Round:
    settings = json.loads((job.folder / "adapters/0/adapter_config.json").read_text())
    vocabulary = json.loads((job.folder / "config.json").read_text())["vocab_size"]
    llm = LLM(
        str(job.folder),
        dtype="bfloat16",
        enable_lora=True,
        max_loras=job.requests,
        max_lora_rank=settings["r"],
        lora_target_modules=settings["target_modules"],
        max_model_len=2048,
        max_num_seqs=64,
        disable_log_stats=True,
    )
    adapters = [LoRARequest(str(index), index + 1, str(job.folder / "adapters" / str(index))) for index in range(job.requests)]

    def run(number: int, new: int) -> int:
        sampling = SamplingParams(temperature=0, max_tokens=new, min_tokens=new, ignore_eos=True)
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(1, vocabulary, (job.requests, job.prompt), generator=generator).tolist()
        outputs = llm.generate([{"prompt_token_ids": row} for row in ids], sampling, lora_request=adapters, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return run


if __name__ == "__main__":
    serve(build)

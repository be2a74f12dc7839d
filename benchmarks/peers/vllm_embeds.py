"""vLLM with `prompt_embeds`, offline and in-process: no gRPC, no client. Runs in vLLM's own virtual environment."""

from __future__ import annotations

import json

import torch
from vllm import LLM, SamplingParams

from peers.worker import Job, Round, serve


def build(job: Job) -> Round:
    hidden = json.loads((job.folder / "config.json").read_text())["hidden_size"]
    llm = LLM(str(job.folder), dtype="bfloat16", enable_prompt_embeds=True, max_model_len=2048, max_num_seqs=64, disable_log_stats=True)

    def run(number: int, new: int) -> int:
        sampling = SamplingParams(temperature=0, max_tokens=new, min_tokens=new, ignore_eos=True)
        generator = torch.Generator().manual_seed(number)
        embeds = torch.randn(job.requests, job.prompt, hidden, generator=generator).mul_(0.02).bfloat16()
        outputs = llm.generate([{"prompt_embeds": rows} for rows in embeds], sampling, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return run


if __name__ == "__main__":
    serve(build)

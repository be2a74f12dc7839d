"""transformers' `generate(inputs_embeds=...)`: one static batch, every row with embeddings of its own."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from peers.worker import Job, Round, serve


def build(job: Job) -> Round:
    torch.set_num_threads(job.threads)
    model = AutoModelForCausalLM.from_pretrained(job.folder, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def run(number: int, new: int) -> int:
        generator = torch.Generator().manual_seed(number)
        embeds = torch.randn(job.requests, job.prompt, model.config.hidden_size, generator=generator).mul_(0.02).bfloat16()
        mask = torch.ones(job.requests, job.prompt, dtype=torch.long)
        out = model.generate(inputs_embeds=embeds, attention_mask=mask, do_sample=False, min_new_tokens=new, max_new_tokens=new)
        return int(out.numel())

    return run


if __name__ == "__main__":
    serve(build)

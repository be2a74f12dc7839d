"""PEFT's mixed-adapter batch: `generate(adapter_names=[...])`, one static batch, every row with an adapter of its own."""

from __future__ import annotations

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from peers.worker import Job, Round, serve


def build(job: Job) -> Round:
    torch.set_num_threads(job.threads)
    base = AutoModelForCausalLM.from_pretrained(job.folder, dtype=torch.bfloat16)
    names = [str(index) for index in range(job.requests)]
    model = PeftModel.from_pretrained(base, job.folder / "adapters" / names[0], adapter_name=names[0], autocast_adapter_dtype=False)
    for name in names[1:]:
        model.load_adapter(job.folder / "adapters" / name, adapter_name=name, autocast_adapter_dtype=False)
    model.eval()

    @torch.inference_mode()
    def run(number: int, new: int) -> int:
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(1, model.config.vocab_size, (job.requests, job.prompt), generator=generator)
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            adapter_names=names,
            do_sample=False,
            min_new_tokens=new,
            max_new_tokens=new,
        )
        return int(out.numel() - ids.numel())

    return run


if __name__ == "__main__":
    serve(build)

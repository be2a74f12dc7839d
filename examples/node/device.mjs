#!/usr/bin/env node
// A whole device: fetch the server's bundle (or open a folder), compose, generate, tune for a few steps.
//
//     node device.mjs ADDRESS JOB.json [BUNDLE]
//
// JOB: {"prompt", "max_tokens", "examples": [{"prompt", "target"}], "steps", "learning_rate", "weight_decay", "clip"}.
// Prints one JSON object: bundle id, token ids, soft prompt, generated text, losses and the tuned personal tensors.
import { readFile } from "node:fs/promises";
import { Bundle } from "./bundle.mjs";
import { PromptEncoder } from "./encoder.mjs";
import { Server } from "./server.mjs";

async function main([address, jobPath, folder]) {
  if (!jobPath) throw new Error("usage: node device.mjs ADDRESS JOB.json [BUNDLE]");
  const job = JSON.parse(await readFile(jobPath, "utf8"));
  const server = new Server(address);
  try {
    const model = await server.model();
    const bundle = folder ? await Bundle.open(folder) : await Bundle.fetch(server.catalog, model.bundle_id);
    if (bundle.manifest.fm.fingerprint !== model.fingerprint) throw new Error("the bundle was made for another model");
    console.log(JSON.stringify(await work(server, bundle, job)));
  } finally {
    server.close();
  }
}

async function work(server, bundle, job) {
  const encoder = await PromptEncoder.load(bundle);
  const soft = await encoder.compose(await encoder.encode([job.prompt]), encoder.start);
  const generated = await server.generate(job.prompt, { shape: soft.shape.slice(1), data: soft.data }, job.max_tokens);
  const tuned = await tune(server, encoder, job);
  return {
    bundle_id: bundle.id,
    tokens: encoder.tokenize(job.prompt),
    soft_prompt: [...soft.data],
    ...generated,
    losses: tuned.losses,
    personal: Object.fromEntries(Object.keys(encoder.start).map((name) => [name, [...tuned.state[name].data]])),
  };
}

// Every step takes all examples; the loss is the mean over their target tokens.
async function tune(server, encoder, { examples, steps, learning_rate, weight_decay, clip }) {
  const instance = await encoder.encode(examples.map(({ prompt }) => prompt));
  let state = { ...encoder.start, ...encoder.moments() };
  const losses = [];
  for (let step = 1; step <= steps; step++) {
    const personal = Object.fromEntries(Object.keys(encoder.start).map((name) => [name, state[name]]));
    const soft = await encoder.compose(instance, personal);
    const { loss, gradient } = await server.gradients(examples, soft);
    state = await encoder.update(instance, state, soft.carried, gradient, { learning_rate, weight_decay, clip, step });
    losses.push(loss);
  }
  return { state, losses };
}

try {
  await main(process.argv.slice(2));
} catch (error) {
  console.error(`device.mjs: ${error.message}`);
  process.exitCode = 1;
}

// The wire, straight from proto/lopa/v1: soft prompts as float32, receipts checked.
import { fileURLToPath } from "node:url";
import { dirname, join } from "node:path";
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";
import { sha256 } from "./bundle.mjs";
import { fromBytes, toBytes } from "./tensors.mjs";

const PROTO = join(dirname(fileURLToPath(import.meta.url)), "..", "..", "proto");
const F32 = 1;
const FRONT = 1;

export class Server {
  constructor(address) {
    const files = ["catalog", "inference", "tuning"].map((name) => `lopa/v1/${name}.proto`);
    const definition = loader.loadSync(files, { includeDirs: [PROTO], keepCase: true, enums: String, longs: Number, defaults: true });
    const { Catalog, Inference, Tuning } = grpc.loadPackageDefinition(definition).lopa.v1;
    const options = { "grpc.max_receive_message_length": 64 * 2 ** 20 };
    [this.catalog, this.inference, this.tuning] = [Catalog, Inference, Tuning].map(
      (Service) => new Service(address, grpc.credentials.createInsecure(), options),
    );
  }

  close() {
    for (const client of [this.catalog, this.inference, this.tuning]) client.close();
  }

  model() {
    return call(this.catalog, "GetModel", {});
  }

  // Greedy text behind one soft prompt (m, d).
  async generate(prompt, soft, maxTokens) {
    const sent = message(soft);
    const result = { text: "", token_ids: [] };
    for await (const delta of this.inference.Generate({ prompt: { text: prompt }, soft_prompt: sent, sampling: { max_tokens: maxTokens } })) {
      result.text += delta.text;
      result.token_ids.push(...delta.token_ids);
      if (delta.receipt) result.receipt = checkReceipt(delta.receipt, sent);
    }
    if (!result.receipt) throw new Error("the reply ended without a receipt");
    return result;
  }

  // Pairs with soft prompts (b, m, d) -> summed NLL, target tokens, and the gradient of the mean NLL per token: (b, m, d).
  async gradients(examples, soft) {
    const [, rows, hidden] = soft.shape;
    const size = rows * hidden;
    const each = examples.map((_, i) => message({ shape: [rows, hidden], data: soft.data.subarray(i * size, (i + 1) * size) }));
    const pairs = examples.map(({ prompt, target }, i) => ({ prompt: { text: prompt }, target: { text: target }, soft_prompt: each[i] }));
    const { gradients } = await call(this.tuning, "PromptGradients", { pairs, gradient_dtype: F32 });
    gradients.forEach((gradient, i) => checkReceipt(gradient.receipt, each[i]));
    const nll = gradients.reduce((sum, gradient) => sum + gradient.nll_sum, 0);
    const tokens = gradients.reduce((sum, gradient) => sum + gradient.target_tokens, 0);
    const data = Float32Array.from(gradients.flatMap(({ gradient }) => [...fromBytes(gradient.data)]), (value) => value / tokens);
    return { loss: nll / tokens, gradient: { shape: soft.shape, data } };
  }
}

const call = (client, method, request) =>
  new Promise((resolve, reject) => client[method](request, (error, reply) => (error ? reject(error) : resolve(reply))));

const message = ({ shape: [rows, hidden], data }) => ({ rows, hidden, dtype: F32, data: toBytes(data), placement: FRONT });

function checkReceipt(receipt, { rows, hidden, dtype, placement, data }) {
  const numbers = Buffer.alloc(16);
  [rows, hidden, dtype, placement].forEach((value, i) => numbers.writeUInt32LE(value, 4 * i));
  const expected = sha256("lopa.v1.SoftPrompt\n", numbers, data);
  if (!expected.equals(receipt.soft_prompt_sha256)) throw new Error("the receipt is not for the soft prompt that was sent");
  return { soft_prompt_sha256: expected.toString("hex"), rows: receipt.rows };
}

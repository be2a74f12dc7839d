// The prompt encoder: a tokenizer and the bundle's three graphs. It knows tensors by name, no method's meaning.
import "./quiet.mjs"; // before the runtime is loaded
import { Tokenizer } from "@huggingface/tokenizers";
import ort from "onnxruntime-node";
import { readSafetensors } from "./tensors.mjs";

export class PromptEncoder {
  static async load(bundle) {
    const encoder = new PromptEncoder();
    encoder.manifest = bundle.manifest;
    encoder.tokenizer = new Tokenizer(JSON.parse(bundle.files.get("tokenizer.json").toString("utf8")), {});
    const options = { executionProviders: ["cpu"], intraOpNumThreads: 1, interOpNumThreads: 1 };
    const session = (name) => ort.InferenceSession.create(bundle.files.get(`${name}.onnx`), options);
    [encoder.encodeGraph, encoder.composeGraph, encoder.updateGraph] = await Promise.all(["encode", "compose", "update"].map(session));
    encoder.start = readSafetensors(bundle.files.get("factors.safetensors"));
    return encoder;
  }

  // Token ids as the manifest says: special tokens added, and the text between them cut to fit on its side.
  tokenize(text) {
    const { max_tokens: limit, truncation_side: side } = this.manifest.encoder;
    const whole = this.tokenizer.encode(text).ids;
    if (whole.length <= limit) return whole.length ? whole : [0];
    const plain = this.tokenizer.encode(text, { add_special_tokens: false }).ids;
    const before = whole.findIndex((_, i) => plain.every((id, j) => whole[i + j] === id));
    const room = limit - (whole.length - plain.length);
    const kept = side === "left" ? plain.slice(plain.length - room) : plain.slice(0, room);
    return [...whole.slice(0, before), ...kept, ...whole.slice(before + plain.length)];
  }

  // Instance tensors of texts, one after the other: name -> { shape: [b, ...], data }.
  async encode(texts) {
    const rows = [];
    for (const text of texts) {
      const ids = this.tokenize(text);
      const int64 = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, ids.length]);
      rows.push(await this.encodeGraph.run({ input_ids: int64(ids), attention_mask: int64(ids.map(() => 1)) }));
    }
    return Object.fromEntries(
      this.manifest.instance.map(({ name, shape }) => {
        const data = Float32Array.from(rows.flatMap((row) => [...row[name].data]));
        return [name, { shape: [rows.length, ...shape], data }];
      }),
    );
  }

  // Soft prompts (b, m, d), with what update takes over from here.
  async compose(instance, personal) {
    const { soft_prompt: soft, ...carried } = await this.composeGraph.run(feeds({ ...instance, ...personal }));
    return { ...plain(soft), carried: Object.fromEntries(Object.entries(carried).map(([name, value]) => [name, plain(value)])) };
  }

  // The optimizer's state before the first step.
  moments() {
    const zeros = (kind) => ([name, { shape, data }]) => [`${kind}.${name}`, { shape, data: new Float32Array(data.length) }];
    return Object.fromEntries(["exp_avg", "exp_avg_sq"].flatMap((kind) => Object.entries(this.start).map(zeros(kind))));
  }

  // One optimizer step: back through compose, clip, AdamW. state: personal tensors and moments; the new ones come back.
  // carried: of compose for the same instance and personal tensors.
  async update(instance, state, carried, gradient, scalars) {
    const numbers = Object.fromEntries(Object.entries(scalars).map(([name, value]) => [name, { shape: [], data: Float32Array.of(value) }]));
    const outputs = await this.updateGraph.run(feeds({ ...instance, ...state, ...carried, ...numbers, gradient }));
    return Object.fromEntries(Object.entries(state).map(([name, { shape }]) => [name, { shape, data: outputs[`new.${name}`].data }]));
  }
}

const plain = ({ dims, data }) => ({ shape: [...dims], data });

const feeds = (tensors) =>
  Object.fromEntries(Object.entries(tensors).map(([name, { shape, data }]) => [name, new ort.Tensor("float32", data, shape)]));

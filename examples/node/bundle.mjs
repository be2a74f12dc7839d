// A bundle: verified files in memory, from a folder or from a server's archive. proto/lopa/v1 and docs/export.md say what it holds.
import { createHash } from "node:crypto";
import { readFile } from "node:fs/promises";
import { join } from "node:path";

const MANIFEST = "manifest.json";
const MAX_ARCHIVE_BYTES = 4 * 2 ** 30;

export const sha256 = (...parts) => parts.reduce((hash, part) => hash.update(part), createHash("sha256")).digest();

export class BundleError extends Error {}

// manifest: parsed; files: name -> Buffer. Throws a BundleError for anything that is not what the manifest says.
export class Bundle {
  constructor(files) {
    const text = files.get(MANIFEST)?.toString("utf8");
    if (text === undefined) throw new BundleError(`${MANIFEST} is missing`);
    this.manifest = JSON.parse(text);
    if (this.manifest.schema !== 1) throw new BundleError(`manifest.schema is ${this.manifest.schema}; this example reads 1`);
    this.id = this.manifest.id;
    const computed = sha256(canonical(text, this.manifest)).toString("hex");
    if (computed !== this.id) throw new BundleError(`${MANIFEST} says id ${this.id}, its content has ${computed}`);
    for (const [name, spec] of Object.entries(this.manifest.files)) {
      const data = files.get(name);
      if (data?.length !== spec.size || sha256(data).toString("hex") !== spec.sha256) {
        throw new BundleError(`${name} is not what the manifest says`);
      }
    }
    this.files = files;
  }

  static async open(folder) {
    const manifest = await readFile(join(folder, MANIFEST));
    const names = Object.keys(JSON.parse(manifest.toString("utf8")).files);
    const read = await Promise.all(names.map(async (name) => [name, await readFile(join(folder, name))]));
    return new Bundle(new Map([[MANIFEST, manifest], ...read]));
  }

  // catalog: a gRPC client of lopa.v1.Catalog.
  static async fetch(catalog, bundleId) {
    const chunks = [];
    let received = 0;
    for await (const chunk of catalog.FetchBundle({ bundle_id: bundleId, offset: 0 })) {
      const total = chunk.total_bytes;
      received += chunk.data.length;
      if (total > MAX_ARCHIVE_BYTES || received > total) throw new BundleError(`the archive has more than ${total} bytes`);
      chunks.push(chunk.data);
    }
    const bundle = new Bundle(unzip(Buffer.concat(chunks)));
    if (bundle.id !== bundleId) throw new BundleError(`the server sent bundle ${bundle.id} as ${bundleId}`);
    return bundle;
  }
}

// What the id is the digest of: the manifest's own text without whitespace between tokens and without the members id and signature.
// Numbers keep the spelling that they were written with, which JSON.stringify would change.
function canonical(text, manifest) {
  const compact = text.replace(/("(?:[^"\\]|\\.)*")|\s+/g, (_, string) => string ?? "");
  return ["id", "signature"].reduce((rest, name) => rest.replace(`"${name}":${JSON.stringify(manifest[name])},`, ""), compact);
}

// The archive is a ZIP of stored (uncompressed) files.
function unzip(archive) {
  const end = archive.lastIndexOf(Buffer.from("PK\x05\x06"));
  if (end < 0) throw new BundleError("the archive is no ZIP");
  const files = new Map();
  let entry = archive.readUInt32LE(end + 16);
  for (let i = 0; i < archive.readUInt16LE(end + 10); i++) {
    const [method, size] = [archive.readUInt16LE(entry + 10), archive.readUInt32LE(entry + 24)];
    const [nameLength, extra, comment] = [28, 30, 32].map((at) => archive.readUInt16LE(entry + at));
    if (method !== 0) throw new BundleError("the archive has compressed files");
    const local = archive.readUInt32LE(entry + 42);
    const start = local + 30 + archive.readUInt16LE(local + 26) + archive.readUInt16LE(local + 28);
    if (start + size > archive.length) throw new BundleError("the archive is cut off");
    files.set(archive.toString("utf8", entry + 46, entry + 46 + nameLength), archive.subarray(start, start + size));
    entry += 46 + nameLength + extra + comment;
  }
  return files;
}

// safetensors with F16 and F32 entries -> name -> { shape, data: Float32Array }.
export function readSafetensors(buffer) {
  const headerLength = Number(buffer.readBigUInt64LE(0));
  const header = JSON.parse(buffer.toString("utf8", 8, 8 + headerLength));
  const tensors = {};
  for (const [name, { dtype, shape, data_offsets: [from, to] }] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    const bytes = buffer.subarray(8 + headerLength + from, 8 + headerLength + to);
    const count = shape.reduce((product, size) => product * size, 1);
    const width = { F16: 2, F32: 4 }[dtype];
    if (width === undefined || bytes.length !== count * width) throw new Error(`${name} is ${dtype} of ${bytes.length} bytes`);
    const read = dtype === "F16" ? (i) => half(bytes.readUInt16LE(2 * i)) : (i) => bytes.readFloatLE(4 * i);
    tensors[name] = { shape, data: Float32Array.from({ length: count }, (_, i) => read(i)) };
  }
  return tensors;
}

function half(bits) {
  const [sign, exponent, fraction] = [bits & 0x8000 ? -1 : 1, (bits >> 10) & 31, bits & 1023];
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
}

// Float32Array -> little-endian bytes, and back.
export function toBytes(values) {
  const buffer = Buffer.alloc(4 * values.length);
  values.forEach((value, i) => buffer.writeFloatLE(value, 4 * i));
  return buffer;
}

export const fromBytes = (buffer) => Float32Array.from({ length: buffer.length / 4 }, (_, i) => buffer.readFloatLE(4 * i));

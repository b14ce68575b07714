// `node run_graph.mjs MODULES FOLDER OUTPUT`: what run_graph.py does, with onnxruntime-web (WebAssembly) in Node.
import { mkdirSync, readFileSync, writeFileSync, existsSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";

const [modules, folder, output] = process.argv.slice(2);
const require = createRequire(join(modules, "node_modules", "x.js"));
const ort = require("onnxruntime-web");
ort.env.wasm.numThreads = 1;

const BUFFERS = { float32: Float32Array, int64: BigInt64Array, bool: Uint8Array };
const bytesOf = (path) => { const b = readFileSync(path); return b.buffer.slice(b.byteOffset, b.byteOffset + b.byteLength); };

const feeds = {};
for (const { name, dtype, shape, file } of JSON.parse(readFileSync(join(folder, "tensors.json"), "utf8"))) {
  feeds[name] = new ort.Tensor(dtype, new BUFFERS[dtype](bytesOf(join(folder, file))), shape);
}
const graph = readFileSync(join(folder, "graph.txt"), "utf8");
const weights = join(dirname(graph), "weights.data");
const externalData = existsSync(weights) ? [{ path: "weights.data", data: new Uint8Array(bytesOf(weights)) }] : [];
const session = await ort.InferenceSession.create(new Uint8Array(bytesOf(graph)), {
  executionProviders: ["wasm"], externalData,
});
const made = await session.run(feeds);

mkdirSync(output, { recursive: true });
const listed = session.outputNames.map((name, number) => {
  const { type, dims, data } = made[name];
  writeFileSync(join(output, `${number}.bin`), new Uint8Array(data.buffer, data.byteOffset, data.byteLength));
  return { name, dtype: type, shape: dims, file: `${number}.bin` };
});
writeFileSync(join(output, "tensors.json"), JSON.stringify(listed));
const described = JSON.parse(readFileSync(join(modules, "node_modules", "onnxruntime-web", "package.json"), "utf8"));
writeFileSync(join(output, "version.txt"), described.version);

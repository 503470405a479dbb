/*
 * @nats-io/obj on a pipe: one JSON object per line in, one per line out. Driven by client.py.
 *
 *   argument:  the server's address
 *   request:   {"id": 1, "op": "get", "bucket": "b", ...}
 *   answer:    {"id": 1, "value": ...} or {"id": 1, "error": "text"}, in any order
 *   watching:  {"watch": 1, "info": {...}} for every update after the answer to request 1
 *
 * Content travels as base64. Requests run concurrently, so one that hangs (a known fault of readers whose chunks
 * are purged) blocks no other. The process ends when its input does.
 */

import { createInterface } from "node:readline";
import { connect, headers } from "@nats-io/transport-node";
import { Objm } from "@nats-io/obj";

const connection = await connect({ servers: process.argv[2], name: "interop-js" });
const manager = new Objm(connection);

function say(message) {
  process.stdout.write(JSON.stringify(message) + "\n");
}

function plain(info) {
  if (info === null || info === undefined) return null;
  // watch() yields the parsed JSON itself, the other calls wrap it
  const record = info.headers && typeof info.headers.keys === "function"
    ? Object.fromEntries(info.headers.keys().map((key) => [key, info.headers.values(key)]))
    : info.headers ?? {};
  return {
    name: info.name,
    bucket: info.bucket,
    nuid: info.nuid ?? null,
    size: info.size ?? null,
    chunks: info.chunks ?? null,
    digest: info.digest ?? null,
    mtime: info.mtime ?? null,
    deleted: info.deleted ?? false,
    description: info.description ?? "",
    metadata: info.metadata ?? {},
    headers: record,
    link: info.options?.link ?? null,
    isUpdate: info.isUpdate ?? null,
  };
}

function meta(request) {
  const result = { name: request.name };
  if (request.description !== undefined) result.description = request.description;
  if (request.metadata !== undefined) result.metadata = request.metadata;
  if (request.headers !== undefined) {
    result.headers = headers();
    for (const [key, values] of Object.entries(request.headers)) {
      for (const value of values) result.headers.append(key, value);
    }
  }
  if (request.chunk !== undefined) result.options = { max_chunk_size: request.chunk };
  return result;
}

async function report(request, iterator) {
  for await (const info of iterator) say({ watch: request.id, info: plain(info) });
}

const operations = {
  async create({ bucket, options }) {
    await manager.create(bucket, options ?? {});
  },
  async buckets() {
    const names = [];
    for await (const status of manager.list()) names.push(status.bucket);
    return names;
  },
  async status(store) {
    const status = await store.status();
    return {
      bucket: status.bucket,
      description: status.description,
      sealed: status.sealed,
      size: status.size,
      storage: status.storage,
      replicas: status.replicas,
      metadata: status.metadata ?? {},
      compression: status.compression,
    };
  },
  async put(store, request) {
    return plain(await store.putBlob(meta(request), Buffer.from(request.data, "base64")));
  },
  async get(store, { name }) {
    const data = await store.getBlob(name);
    return data === null ? null : Buffer.from(data).toString("base64");
  },
  async info(store, { name }) {
    return plain(await store.info(name));
  },
  async list(store) {
    return (await store.list()).map(plain);
  },
  async delete(store, { name }) {
    return (await store.delete(name)).success;
  },
  async update(store, request) {
    const changed = meta({ ...request, name: request.rename ?? request.name });
    await store.update(request.name, changed);
  },
  async link(store, { name, target }) {
    const source = target.bucket === undefined ? store : await manager.open(target.bucket);
    return plain(await store.link(name, await source.info(target.name)));
  },
  async linkStore(store, { name, target }) {
    return plain(await store.linkStore(name, await manager.open(target.bucket)));
  },
  async watch(store, request) {
    const iterator = await store.watch(request.options ?? {});
    report(request, iterator).catch((error) => say({ watch: request.id, error: String(error) }));
  },
  async seal(store) {
    await store.seal();
  },
};

const without = new Set(["create", "buckets"]);

async function answer(request) {
  try {
    const operation = operations[request.op];
    if (operation === undefined) throw new Error(`unknown operation ${request.op}`);
    const value = without.has(request.op)
      ? await operation(request)
      : await operation(await manager.open(request.bucket), request);
    say({ id: request.id, value: value ?? null });
  } catch (error) {
    say({ id: request.id, error: String(error) });
  }
}

say({ ready: true });
for await (const line of createInterface({ input: process.stdin, crlfDelay: Infinity })) {
  answer(JSON.parse(line));
}
process.exit(0);

/** Lorry's front door for a web app: submit a training, follow it, end it, check its webhooks, and choose the adapter
 *  that answers a conversation. No dependencies.
 *
 *  const lorry = new Lorry({ url: process.env.GPU_CLUSTER_API_URL!, key: process.env.GPU_CLUSTER_API_KEY! });
 *  const job = await lorry.submit({ job_id: row.id, dataset_url, hyperparameters: { epochs: 3 } });
 *  const { url, model } = await lorry.chatFor(conversation.id);
 */

export type Phase = "IN_QUEUE" | "IN_PROGRESS" | "COMPLETED" | "FAILED" | "CANCELLED";

/** What a training is made of. What is left out is the recipe's. */
export interface TrainingJob {
  /** Your own id of the job, such as the row's uuid: sent twice, it is one job. */
  job_id?: string;
  /** An https link that works now; the front door fetches and keeps the file before it answers. */
  dataset_url: string;
  base_model?: string;
  hyperparameters?: {
    epochs?: number;
    learning_rate?: number;
    batch_size?: number;
    rank?: number;
    alpha?: number;
    weight_decay?: number;
    seed?: number;
  };
  gpu_config?: { type?: string; count?: number };
}

export interface Understood {
  recipe: string;
  base_model: string;
  epochs: number;
  learning_rate: number;
  batch_size: number;
  rank: number;
  alpha: number;
  gpu?: string | null;
  gpu_count?: number;
  ignored: string[];
}

export interface Submitted {
  id: string;
  status: Phase;
  understood: Understood;
  quote_usd: number;
  cap_usd: number;
  notes: string[];
}

/** Whole numbers for epoch and step; loss and learning rate stand together or not at all. */
export interface Progress {
  progress: number;
  stage: string;
  current_epoch: number;
  current_step: number;
  total_steps: number;
  message: string;
  eta_seconds?: number;
  metrics?: { training_loss: number; learning_rate: number; validation_loss?: number; throughput?: number };
  /** Of a finished job: links that need no key, for an hour. Ask for the status again for new ones. */
  model_files?: Record<string, string>;
  model_metadata?: Record<string, unknown>;
}

export interface JobStatus {
  id: string;
  status: Phase;
  output?: Progress;
  error?: string;
  understood: Understood;
  cost: { usd: number | null; settled: boolean; quote_usd: number | null; cap_usd: number | null };
}

export interface Quote {
  gpu: string | null;
  quote_usd: number;
  cap_usd: number;
  usd: { low: number; likely: number; high: number };
  hours: { low: number; likely: number; high: number };
  total_steps: number;
  notes: string[];
}

export type JobEvent =
  | { event: "metrics"; id: string; data: { kind: "train" | "eval"; step: number; [name: string]: unknown } }
  | { event: "status"; data: Progress & { status: Phase; error?: string } }
  | { event: "end"; data: { status: Phase } };

/** Where chats go. `canary` answers its share of the conversations, `model` all others. */
export interface Inference {
  url: string | null;
  model: string | null;
  canary: { model: string; share: number } | null;
}

export interface Adapter {
  id: string;
  model: string;
  base_model: string;
  evaluation: "none" | "passed" | "not passed";
  live: boolean;
  canary: boolean;
}

/** What went wrong, in the front door's own words. `code` is stable: bad_input, refused, not_found, conflict, ... */
export class LorryError extends Error {
  constructor(
    message: string,
    readonly status: number,
    readonly code: string,
    readonly problems: { where: string; got: string; want: string }[] = [],
  ) {
    super(message);
    this.name = "LorryError";
  }
}

export class Lorry {
  private readonly url: string;
  private readonly headers: Record<string, string>;
  private readonly reporter = crypto.randomUUID();
  private inference: { at: number; value: Promise<Inference> } | undefined;
  private counts = new Map<string, { window: number; answered: number; failed: number }>();

  constructor(options: { url: string; key: string }) {
    this.url = options.url.replace(/\/+$/, "");
    this.headers = { Authorization: `Bearer ${options.key}`, "Content-Type": "application/json" };
  }

  /** Starts a training. The same job_id or idempotency key never starts two; another body under it is a conflict. */
  submit(job: TrainingJob, options: { idempotencyKey?: string } = {}): Promise<Submitted> {
    const headers = options.idempotencyKey ? { "Idempotency-Key": options.idempotencyKey } : {};
    return this.call("POST", "/run", { input: job }, { headers });
  }

  /** What it would do and cost. Nothing is started. */
  quote(job: Partial<TrainingJob>): Promise<Quote> {
    return this.call("POST", "/quote", { input: job });
  }

  status(id: string): Promise<JobStatus> {
    return this.call("GET", `/status/${encodeURIComponent(id)}`);
  }

  /** Ends the job and its machine. */
  cancel(id: string): Promise<JobStatus> {
    return this.call("POST", `/cancel/${encodeURIComponent(id)}`);
  }

  /** Starts a failed job again, under its own id. */
  retry(id: string): Promise<JobStatus> {
    return this.call("POST", `/retry/${encodeURIComponent(id)}`);
  }

  /** Events until the job ends. A broken connection is taken up again after the last metrics that were seen. */
  async *stream(id: string, options: { lastEventId?: string; signal?: AbortSignal } = {}): AsyncGenerator<JobEvent> {
    let last = options.lastEventId ?? "0";
    for (let failures = 0; ; ) {
      try {
        const headers = { ...this.headers, Accept: "text/event-stream", "Last-Event-ID": last };
        const url = `${this.url}/events/${encodeURIComponent(id)}`;
        const answer = await fetch(url, { headers, ...(options.signal ? { signal: options.signal } : {}) });
        if (!answer.ok || !answer.body) throw await errorOf(answer);
        for await (const event of eventsOf(answer.body)) {
          failures = 0;
          if (event.event === "metrics") last = event.id;
          yield event;
          if (event.event === "end") return;
        }
      } catch (error) {
        const isFinal = error instanceof LorryError && error.status < 500;
        if (isFinal || options.signal?.aborted || ++failures > 8) throw error;
      }
      await new Promise((resolve) => setTimeout(resolve, 500 * 2 ** Math.min(failures, 6)));
    }
  }

  /** Finished adapters, and where chats go. */
  adapters(): Promise<{ adapters: Adapter[]; inference: Inference }> {
    return this.call("GET", "/adapters");
  }

  /** Makes an adapter live once the server is heard to answer with it; that may take minutes. */
  promote(id: string): Promise<{ deed: string; sentence: string; inference: Inference }> {
    return this.call("POST", `/adapters/${encodeURIComponent(id)}/promote`);
  }

  /** Makes the adapter live again that was live before. */
  rollBack(): Promise<{ deed: string; sentence: string; inference: Inference }> {
    return this.call("POST", "/adapters/roll-back");
  }

  /** Where a conversation's chat goes, and by which model's name. The front door is asked at most every 30 seconds;
   *  where it does not answer within three, what it said last still holds. */
  async chatFor(conversation: string): Promise<{ url: string; model: string }> {
    const known = this.inference;
    if (!known || Date.now() - known.at > 30_000) {
      const asked = this.call<{ inference: Inference }>("GET", "/adapters", undefined, soon());
      const value = asked.then((told) => told.inference).catch((error) => {
        if (known) return known.value;
        this.inference = undefined;
        throw error;
      });
      this.inference = { at: Date.now(), value };
    }
    const value = await this.inference!.value;
    if (!value.url || !value.model) throw new LorryError("nothing is served for this client yet", 422, "refused");
    return { url: value.url, model: await modelFor(value, conversation) };
  }

  /** Counts how a chat ended: `answered` is false for an error, no answer or a blank one. Totals go to the front door,
   *  no text; where many fail, `lorry serve --check` goes back to the adapter before. It never throws. */
  async countChat(model: string, answered: boolean): Promise<void> {
    const window = Math.floor(Date.now() / 300_000);
    let total = this.counts.get(model);
    if (total?.window !== window) this.counts.set(model, (total = { window, answered: 0, failed: 0 }));
    total[answered ? "answered" : "failed"] += 1;
    const told = { model, reporter: this.reporter, ...total };
    await this.call("POST", "/adapters/outcomes", told, soon()).catch(() => undefined);
  }

  private async call<T>(method: string, path: string, body?: unknown, more: More = {}): Promise<T> {
    const init: RequestInit = { ...more, method, headers: { ...this.headers, ...more.headers } };
    if (body !== undefined) init.body = JSON.stringify(body);
    const answer = await fetch(this.url + path, init);
    if (!answer.ok) throw await errorOf(answer);
    return (await answer.json()) as T;
  }
}

/** The model that answers a conversation, always the same one while a canary stands: the canary where the first 32 bits
 *  of SHA-256("CANARY'S NAME\nCONVERSATION"), as a fraction of 2^32, lie below its share. A larger share keeps the
 *  conversations it has; another canary gets others. */
export async function modelFor(inference: Inference, conversation: string): Promise<string> {
  const { model, canary } = inference;
  if (canary) {
    const text = new TextEncoder().encode(`${canary.model}\n${conversation}`);
    const digest = new DataView(await crypto.subtle.digest("SHA-256", text));
    if (digest.getUint32(0) / 2 ** 32 < canary.share) return canary.model;
  }
  return model ?? "";
}

/** The message of a webhook, once its signature and its age are right; throws LorryError otherwise.
 *
 *  `body` is the raw text of the request: parsed and printed again, it would no longer be what was signed.
 *  Deliveries come at least once: keep `delivery` and drop what you have seen.
 */
export async function verifyWebhook<T = Record<string, unknown>>(
  headers: Headers,
  body: string,
  secret: string,
  options: { toleranceSeconds?: number; now?: number } = {},
): Promise<{ delivery: string; message: T }> {
  const timestamp = headers.get("lorry-timestamp") ?? "";
  const signature = /^sha256=([0-9a-f]{64})$/.exec(headers.get("lorry-signature") ?? "")?.[1];
  const refuse = (why: string) => new LorryError(`webhook: ${why}`, 401, "unauthorized");
  if (!signature || !/^\d{1,12}$/.test(timestamp)) throw refuse("it is not signed");
  const now = options.now ?? Date.now() / 1000;
  if (Math.abs(now - Number(timestamp)) > (options.toleranceSeconds ?? 300)) throw refuse("it is too old");
  const encoder = new TextEncoder();
  const algorithm = { name: "HMAC", hash: "SHA-256" };
  const key = await crypto.subtle.importKey("raw", encoder.encode(secret), algorithm, false, ["verify"]);
  const bytes = Uint8Array.from(signature.match(/../g) ?? [], (pair) => parseInt(pair, 16));
  const isOurs = await crypto.subtle.verify("HMAC", key, bytes, encoder.encode(`${timestamp}.${body}`));
  if (!isOurs) throw refuse("its signature is wrong");
  return { delivery: headers.get("lorry-delivery") ?? "", message: JSON.parse(body) as T };
}

type More = { headers?: Record<string, string>; signal?: AbortSignal };
const soon = (): More => ({ signal: AbortSignal.timeout(3_000) }); // a chat waits no longer for the front door

async function errorOf(answer: Response): Promise<LorryError> {
  const text = await answer.text();
  try {
    const told = JSON.parse(text);
    return new LorryError(String(told.error), answer.status, String(told.code), told.problems);
  } catch {
    return new LorryError(`the front door answered ${answer.status}`, answer.status, "unexpected");
  }
}

/** Server-sent events: blocks of `name: value` lines, each ended by an empty line; other lines are comments. */
async function* eventsOf(body: ReadableStream<Uint8Array>): AsyncGenerator<JobEvent> {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let text = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const blocks = (text + decoder.decode(value, { stream: true })).split("\n\n");
      text = blocks.pop() ?? "";
      for (const block of blocks) {
        const fields: Record<string, string> = {};
        for (const [, name, content] of block.matchAll(/^(id|event|data): (.*)$/gm)) fields[name!] = content!;
        if (fields.event) yield { ...fields, data: JSON.parse(fields.data ?? "null") } as JobEvent;
      }
    }
  } finally {
    await reader.cancel().catch(() => undefined);
  }
}

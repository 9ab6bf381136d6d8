// Words for numbers and states, and which words of two prompts differ.

const STAGES = {
  load: "opening the model", prompt: "reading the prompt", prepare: "preparing",
  sample: "denoising", sound: "making sound", decode: "decoding", write: "writing",
  assemble: "joining the shots", finish: "finishing",
};

/** Seconds as text. */
export function seconds(value) {
  if (value == null) return "";
  if (value < 1) return "a moment";
  if (value < 90) return `${Math.round(value)} s`;
  if (value < 5400) return `${Math.round(value / 60)} min`;
  return `${(value / 3600).toFixed(1)} h`;
}

/** Length of a clip or film, in seconds with at most two digits. */
export const lengthOf = (job) => `${Number(Number(job.seconds).toFixed(2))} s`;

/** Frames per second out of a fraction such as "24000/1001". */
export function rate(text) {
  const [over, under = 1] = String(text).split("/").map(Number);
  return Number((over / under).toFixed(2));
}

/** State of a job, in a few words. */
export function stateOf(job) {
  switch (job.status) {
    case "queued": {
      const ahead = (job.queue_position ?? 1) - 1;
      return ahead ? `queued, ${ahead} ahead` : "queued, next";
    }
    case "in_progress": {
      const stage = STAGES[job.stage] ?? job.stage ?? "starting";
      const step = job.num_steps ? `, step ${job.step} of ${job.num_steps}` : "";
      const shot = job.shot ? `${job.shot.replace(/^(?!shot\b)/, "shot ")}: ` : "";
      return `${shot}${stage}${step}`;
    }
    case "failed":
      return job.error?.code === "cancelled" ? "cancelled" : "failed";
    default:
      return "done";
  }
}

/** Time left of a job, or nothing. */
export function leftOf(job) {
  return job.eta_s == null ? "" : `${seconds(job.eta_s)} left`;
}

export const splitWords = (text) => text.trim().split(/\s+/).filter(Boolean);

/**
 * Mark the words that two texts share: their longest common subsequence.
 * @returns {[{word: string, same: boolean}[], {word: string, same: boolean}[]]}
 */
export function diffWords(before, after) {
  const a = splitWords(before);
  const b = splitWords(after);
  // length[i][j]: words that a from i and b from j on share
  const length = Array.from({ length: a.length + 1 }, () => new Array(b.length + 1).fill(0));
  for (let i = a.length - 1; i >= 0; i -= 1) {
    for (let j = b.length - 1; j >= 0; j -= 1) {
      length[i][j] = a[i] === b[j]
        ? length[i + 1][j + 1] + 1
        : Math.max(length[i + 1][j], length[i][j + 1]);
    }
  }
  const left = a.map((word) => ({ word, same: false }));
  const right = b.map((word) => ({ word, same: false }));
  for (let i = 0, j = 0; i < a.length && j < b.length;) {
    if (a[i] === b[j]) {
      left[i].same = right[j].same = true;
      i += 1;
      j += 1;
    } else if (length[i + 1][j] >= length[i][j + 1]) {
      i += 1;
    } else {
      j += 1;
    }
  }
  return [left, right];
}

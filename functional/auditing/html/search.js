// Which tensors a search means: words that stand in a path, or a glob as sch.at takes it, on a tensor or a module around it.

const MOST_NAMES = 65536;

function searcher(text) {
  const words = text.trim().toLowerCase().split(/\s+/).filter(Boolean);
  const tests = words.map((word) => (/[*?[{]/.test(word) && globTest(word)) || ((path) => path.toLowerCase().includes(word)));
  return (path) => tests.every((test) => test(path));
}

// How many of the tensors that a row stands for are meant.
function countMatches(row, isMeant) {
  return (row.num === 1 ? [row.path] : expand(row.path)).filter((path) => [path, ...row.tie].some(isMeant)).length;
}

function globTest(glob) {
  const source = globSource(glob);
  if (source === null) return null;
  const whole = new RegExp(`^(?:${source})$`, "i");
  return (path) => prefixes(path).some((prefix) => whole.test(prefix));
}

function prefixes(path) {
  const names = path.split(".");
  return names.map((_, depth) => names.slice(0, depth + 1).join("."));
}

// As specs/pattern.py: * within one name, ** across names, ? one character, [qkv], {gate,up}, and {0..31} as rows are written.
function globSource(glob) {
  const tokens = glob.match(/\{\d+\.\.\d+\}|(?<=^|[.{,])\*\*\.|\*\*|\*|\?|\[!?[^\]!][^\]]*\]|[{},]|[^*?[\]{},]+|./gs) || [];
  let depth = 0;
  let source = "";
  for (const token of tokens) {
    const range = /^\{(\d+)\.\.(\d+)\}$/.exec(token);
    if (range) source += `(?:${span(range[1], range[2]).join("|")})`;
    else if (token === "**.") source += "(?:.+\\.)?";
    else if (token === "**") source += ".+";
    else if (token === "*") source += "[^.]*";
    else if (token === "?") source += "[^.]";
    else if (token === "{") { depth += 1; source += "(?:"; }
    else if (token === "}" && depth) { depth -= 1; source += ")"; }
    else if (token === "," && depth) source += "|";
    else if (token === "[" || token === "]" || token === "}") return null;
    else if (token.startsWith("[")) {
      const isNegated = token[1] === "!";
      source += `(?!\\.)[${isNegated ? "^" : ""}${token.slice(isNegated ? 2 : 1, -1).replace(/[\\^[]/g, "\\$&")}]`;
    } else source += token.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
  }
  return depth ? null : source;
}

function span(first, last) {
  return Array.from({ length: Math.max(0, Math.min(last - first + 1, MOST_NAMES)) }, (_, number) => String(Number(first) + number));
}

// The paths that a folded one stands for.
function expand(path) {
  const range = /\{(\d+)\.\.(\d+)\}/.exec(path);
  if (!range) return [path];
  const [head, tail] = [path.slice(0, range.index), path.slice(range.index + range[0].length)];
  return span(range[1], range[2]).flatMap((number) => expand(tail).map((rest) => head + number + rest));
}

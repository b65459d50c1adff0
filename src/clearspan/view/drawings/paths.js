/** The ways along which attention could have brought something to one position. */

import { named } from "./text.js";

const MOST_FROM_ONE = 3;
const STREAM = { weight: 0, isFaint: true, text: "the residual stream" };

/**
 * Returns the nodes and edges of a graph that starts at a position behind the last block and goes back, layer by layer,
 * along all attention of at least `least`, at most three positions from each. The first position is left out: heads
 * that have nothing to do look there.
 */
export function attentionPaths({ patterns, first, tokens }, target, least) {
  const layers = patterns.shape[0];
  const nodes = [], edges = [];
  let reached = new Set([target]);
  for (let depth = layers; depth >= 0; depth--) {
    nodes.push(...[...reached].map((position) => nodeAt(depth, position, tokens)));
    if (depth === 0) break;
    const layer = depth - 1, next = new Set(reached);
    for (const query of reached) {
      edges.push({ ...edge(layer, query, query), ...STREAM, places: { layer, position: query } });
      for (const { key, head, weight } of looked(patterns, first, layer, query, least)) {
        const who = `layer ${layer} head ${head}: ${named(tokens, query)}`;
        const text = `${who} looks at ${named(tokens, key)}, attention ${weight.toFixed(2)}`;
        edges.push({ ...edge(layer, key, query), weight, text, places: { layer, head, position: key, target: query } });
        next.add(key);
      }
    }
    reached = next;
  }
  return { nodes, edges };
}

const edge = (layer, key, query) => ({
  source: { layer, position: key },
  target: { layer: layer + 1, position: query },
});

function nodeAt(depth, position, tokens) {
  const text = `${named(tokens, position)}, ${depth ? `behind layer ${depth - 1}` : "embedding"}`;
  return { layer: depth, position, text, places: { position, layer: depth - 1 } };
}

/** Returns the keys that some head looks at most from a query, with the head that looks most. */
function looked(patterns, first, layer, query, least) {
  const found = [];
  for (let key = Math.max(first, 1); key < query; key++) {
    let head = 0, weight = 0;
    for (let one = 0; one < patterns.shape[1]; one++) {
      const given = patterns.at(layer, one, query - first, key - first);
      if (given > weight) [head, weight] = [one, given];
    }
    if (weight >= least) found.push({ key, head, weight });
  }
  return found.sort((a, b) => b.weight - a.weight).slice(0, MOST_FROM_ONE);
}

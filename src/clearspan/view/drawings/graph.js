/** A graph whose nodes lie by layer and position. */

import { useLayoutEffect, useRef, useState } from "preact/hooks";
import { scalePoint } from "d3-scale";
import { linkVertical } from "d3-shape";
import { select } from "d3-selection";
import { zoom, zoomIdentity } from "d3-zoom";
import { html } from "./html.js";
import { keys } from "./keyboard.js";
import { useWidth } from "./room.js";

const LAYER = 58;
const LABEL_STEP = 40;
const MARGIN = { left: 74, right: 40, top: 26, bottom: 34 };

/**
 * Draws nodes and edges, the first layer at the bottom.
 *
 * - `nodes`: `layer`, `position`, `text` and `places` (what it stands for in the selection)
 * - `edges`: `source` and `target` (nodes), `weight` from 0 to 1, `text`, `places`; `isFaint` for a thin one
 * - `layers`, `positions`: `labels` and `at`, the numbers that nodes have
 *
 * Drag to move it; the wheel with Ctrl, or two fingers, make it larger; a double click brings it back.
 */
export function Graph({ label, nodes, edges, layers, positions, selection }) {
  const holder = useRef(null), drawing = useRef(null);
  const width = useWidth(holder);
  const transform = useZoom(drawing);
  const height = MARGIN.top + MARGIN.bottom + LAYER * (layers.at.length - 1);

  const x = scalePoint(positions.at, [MARGIN.left, Math.max(MARGIN.left + 1, width - MARGIN.right)]);
  const y = scalePoint(layers.at, [height - MARGIN.bottom, MARGIN.top]);
  const moved = (position) => transform.applyX(x(position));
  const raised = (layer) => transform.applyY(y(layer));
  const curve = linkVertical().x(({ position }) => moved(position)).y(({ layer }) => raised(layer));
  const shown = selection.shown.value;
  const isShown = ({ position, layer }) => position === shown.position && layer === shown.layer;
  const events = (places) => ({
    onPointerEnter: () => selection.point(places),
    onPointerLeave: () => selection.leave(),
    onClick: () => selection.pick(places),
  });
  const onKeyDown = keys({
    ArrowLeft: () => selection.step(["position"], -1),
    ArrowRight: () => selection.step(["position"], 1),
    ArrowUp: () => selection.step(["layer"], 1),
    ArrowDown: () => selection.step(["layer"], -1),
  });
  const step = Math.ceil((positions.at.length * LABEL_STEP) / Math.max(width - MARGIN.left, 1));
  return html`<div class="graph" ref=${holder}>
    <svg ref=${drawing} width=${width} height=${height} tabindex="0" role="img" onKeyDown=${onKeyDown}
        aria-label=${`${label}. ${nodes.length} nodes, ${edges.length} edges`}>
      ${layers.at.map((layer, i) => html`
        <text key=${layer} class="tick" x="0" y=${raised(layer)} dy="0.32em">${layers.labels[i]}</text>`)}
      <g class="edges">${edges.map((edge) => html`
        <path d=${curve(edge)} class=${edge.isFaint ? "faint" : ""} ...${events(edge.places)}
            style=${{ strokeWidth: edge.isFaint ? 1 : 1 + 5 * edge.weight }}>
          <title>${edge.text}</title>
        </path>`)}
      </g>
      <g class="nodes">${nodes.map((node) => html`
        <circle cx=${moved(node.position)} cy=${raised(node.layer)} r="5" class=${isShown(node.places) ? "at" : ""}
            ...${events(node.places)}>
          <title>${node.text}</title>
        </circle>`)}
      </g>
      ${positions.at.map((position, i) => i % step === 0 && html`
        <text key=${position} class="tick ${position === shown.position ? "at" : ""}" x=${moved(position)}
          y=${height - 10} text-anchor="middle">${positions.labels[i]}</text>`)}
    </svg>
  </div>`;
}

/** Returns how far a drawing is moved and enlarged by its reader. */
function useZoom(drawing) {
  const [transform, setTransform] = useState(zoomIdentity);
  useLayoutEffect(() => {
    const zoomed = zoom().scaleExtent([1, 8]).filter(isOurs).on("zoom", (event) => setTransform(event.transform));
    const svg = select(drawing.current).call(zoomed);
    svg.on("dblclick.zoom", () => svg.call(zoomed.transform, zoomIdentity));
    return () => svg.on(".zoom", null);
  }, []);
  return transform;
}

/** Whether the drawing answers: the wheel alone scrolls the page. */
function isOurs(event) {
  return event.type === "wheel" ? event.ctrlKey || event.metaKey : !event.button;
}

// Colour maps that are perceptually uniform and safe for the colour-blind, as 17 stops each: magma,
// cividis and berlin of matplotlib (van der Walt, Smith; Nuñez, Anderton, Renslow; Crameri) and
// Moreland's diverging map for light backgrounds.

const STOPS = {
  magma: "0000040a08221d114736106b51127c6a1c818326819c2e7fb73779d0416fe75263f56b5cfc8961fea772fec488fde2a3fcfdbf",
  cividis: "00224e002e6a1a386f32436d434e6c535a6d61656f6f70737d7c788c88789b9476aba072bcae6ccdbb63dec958f0d846fee838",
  berlin: "9eb0ff79abed519fd33685ad2868861d4b6114303e111a20190c092b0e014112015b1d087d341e9e513fbe6f63df8f89ffadad",
  coolwarm: "3b4cc04e68d86282ea779af78db0fea3c2feb9d0f9ccd9eddddcdcecd3c5f5c4acf7b093f4987aeb7d62dd5f4bca3b37b40426",
};

/** How many colours a table has. */
export const SHADES = 256;

/** Return 256 colours of a map as [r, g, b] in one array; `from` and `to` cut it, backwards too. */
export function table(name, from = 0, to = 1) {
  const stops = STOPS[name].match(/../g).map((hex) => parseInt(hex, 16));
  const found = new Uint8ClampedArray(3 * SHADES);
  for (let i = 0; i < SHADES; i += 1) {
    const at = (from + ((to - from) * i) / (SHADES - 1)) * 16;
    const stop = Math.min(15, Math.floor(at));
    for (let c = 0; c < 3; c += 1) {
      const low = stops[3 * stop + c];
      found[3 * i + c] = Math.round(low + (stops[3 * stop + 3 + c] - low) * (at - stop));
    }
  }
  return found;
}

/** Return the maps of the three views for a dark or a light page. */
export function maps(dark) {
  return {
    load: dark ? table("magma", 0.06, 1) : table("magma", 0.99, 0.06),
    replicas: dark ? table("cividis", 0.04, 1) : table("cividis", 0.98, 0.05),
    even: table(dark ? "berlin" : "coolwarm"),
  };
}

/** Return a colour of a table for CSS; `part` is 0 to 1. */
export function css(colors, part) {
  const i = 3 * Math.round(Math.max(0, Math.min(1, part)) * (SHADES - 1));
  return `rgb(${colors[i]} ${colors[i + 1]} ${colors[i + 2]})`;
}

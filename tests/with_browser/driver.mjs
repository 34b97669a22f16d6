// Drives a browser: a JSON object for each line of standard input, and one for each answer.
// node driver.mjs MODULES CHROMIUM

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { createInterface } from "node:readline";

const [modules, chromiumPath] = process.argv.slice(2);
const require = createRequire(`${modules}/`);
const { chromium } = require("playwright-core");
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");

const browser = await chromium.launch({ executablePath: chromiumPath, args: ["--no-sandbox"] });
let page = null;
let problems = [];

const commands = {
  async open({ url, width, height, scheme, motion }) {
    if (page) await page.context().close();
    problems = [];
    const context = await browser.newContext({
      viewport: { width, height },
      colorScheme: scheme,
      reducedMotion: motion,
    });
    page = await context.newPage();
    page.on("console", (line) => {
      // A browser notes each action that the server refuses.
      const refused = line.location().url.includes("/actions/");
      if (line.type() === "error" && !refused) problems.push(line.text());
    });
    page.on("pageerror", (error) => problems.push(`${error.message}\n${error.stack}`));
    page.on("request", (request) => {
      if (!request.url().startsWith(new URL(url).origin) && !request.url().startsWith("data:")) {
        problems.push(`asks another server: ${request.url()}`);
      }
    });
    await page.goto(url, { waitUntil: "load" });
  },
  run: ({ text }) => page.evaluate(text),
  // Not waitForFunction, whose text the page would evaluate itself, which its policy forbids.
  async wait({ text, timeout }) {
    const until = Date.now() + timeout;
    while (!(await page.evaluate(text))) {
      if (Date.now() > until) throw new Error(`not true within ${timeout} ms`);
      await new Promise((go) => setTimeout(go, 40));
    }
  },
  click: ({ at, position }) => page.click(at, { position, timeout: 10_000 }),
  hover: ({ at, position }) => page.hover(at, { position, timeout: 10_000 }),
  fill: ({ at, value }) => page.fill(at, value, { timeout: 10_000 }),
  choose: ({ at, value }) => page.selectOption(at, value, { timeout: 10_000 }),
  press: ({ key }) => page.keyboard.press(key),
  text: ({ at }) => page.innerText(at, { timeout: 10_000 }),
  address: () => page.url(),
  problems: () => problems,
  async shot({ path, at, full }) {
    if (at) await page.locator(at).screenshot({ path });
    else await page.screenshot({ path, fullPage: full });
  },
  async axe() {
    await page.evaluate(axe);
    const found = await page.evaluate(() => axe.run(document));
    const wrong = found.violations.map((one) => [one.id, one.nodes.map((node) => node.target.join(" "))]);
    return { wrong, passes: found.passes.length };
  },
};

for await (const line of createInterface({ input: process.stdin })) {
  const { do: what, ...more } = JSON.parse(line);
  let answer;
  try {
    answer = { value: (await commands[what](more)) ?? null };
  } catch (error) {
    answer = { error: error.message };
  }
  process.stdout.write(`${JSON.stringify(answer)}\n`);
}
await browser.close();

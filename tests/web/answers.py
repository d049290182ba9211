"""What the scripted model says, by the first word of the question."""

from __future__ import annotations

MARKDOWN = """\
The blue whale is the largest animal known to have lived. Three of its relatives, all of them **rorquals**:

1. The **fin whale**, fast and slender, with one white jaw.
2. The **humpback**, which sings for hours and catches fish in nets of bubbles.
3. The **minke whale**, the smallest of the family.

| Whale    | Length | Weight |
| :------- | -----: | -----: |
| Blue     |   30 m |  150 t |
| Fin      |   26 m |   70 t |
| Humpback |   16 m |   30 t |

A gulp takes in more water than the whale weighs. In Python:

```python
def krill_per_gulp(litres: float, krill_per_litre: float = 10) -> int:
    \"\"\"How many krill one mouthful holds.\"\"\"
    return round(litres * krill_per_litre)
```

Raw HTML stays text: <img src=x onerror=alert(1)>. A [link](https://example.org/whales) opens in a new tab, \
a [bad one](javascript:alert(1)) does not, and ![a whale](https://example.org/whale.png) is not loaded.
"""
MATHS = r"""
The drag on a swimming whale grows with the square of its speed:

\[
F = \tfrac{1}{2}\,\rho\, C_d\, A\, v^2
\]

so the power it needs, \(P = F v\), grows with the cube. At $v = 5$ m/s with $\rho = 1025$ kg/m³:

$$
P = \tfrac12 \cdot 1025 \cdot 0.003 \cdot 200 \cdot 5^3 \approx 38\,\text{kW}
$$

A boat ticket costs $5 or $10, and `$x$` in code stays as it is.
"""
MERMAID = """\
How a rorqual feeds:

```mermaid
flowchart LR
  A[Finds a swarm] --> B[Lunges, mouth open]
  B --> C[Throat pleats unfold]
  C --> D{Mouth closed?}
  D -->|yes| E[Water out through baleen]
  E --> F[Swallows the krill]
```

That takes about a minute.
"""
HTML = """\
A small pond, with a whale that follows the pointer:

```html
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Pond</title>
<style>
  body { margin: 0; height: 100vh; overflow: hidden; font-family: system-ui, sans-serif;
         background: linear-gradient(#bfe3f2, #0a6a94); }
  h1 { margin: 28px; color: #06202d; font-weight: 600; }
  #whale { position: absolute; left: 46%; top: 46%; width: 150px; transition: all .6s ease-out; }
  #log { position: absolute; left: 28px; bottom: 20px; color: #fff; }
</style>
<h1>The pond</h1>
<svg id="whale" viewBox="0 0 64 64"><path fill="#084d6b" d="M3 33C5 22 17 15.5 31 17c8 .9 13.5 4.5 18 5.6 3.2.8
4.8-1.1 4.6-4.1-.2-2.8-1.6-5.2-.5-8.1 3.2.6 5.7 2.8 6.7 6 1.3-2 2.3-2.9 3.8-3.3.6 6.4-1.2 12.9-5.3 18C52.5 38.5 43 46.5
28 48.5 14 50.3 1.5 44 3 33z"/><circle cx="18" cy="31" r="2" fill="#fff"/></svg>
<p id="log">waiting</p>
<script>
  const whale = document.getElementById("whale");
  addEventListener("pointermove", (event) => {
    whale.style.left = event.clientX + "px";
    whale.style.top = event.clientY + "px";
  });
  const tried = [];
  try { parent.document.title; tried.push("parent"); } catch {}
  try { localStorage.length; tried.push("storage"); } catch {}
  try { document.cookie = "a=b"; tried.push("cookie"); } catch {}
  fetch("/health").then(() => "network", () => "").then((word) => {
    if (word) tried.push(word);
    document.getElementById("log").textContent = "reached: " + (tried.join(", ") || "nothing");
  });
</script>
</html>
```

Move the pointer over it.
"""
SVG = """\
```svg
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 200 120"><rect width="200" height="120" rx="16" fill="#ddeff7"/>
<circle cx="100" cy="60" r="36" fill="#0a6a94"/></svg>
```
"""
CITED = """\
The blue whale reaches 29.9 metres and is the largest animal known[citation:2]. It feeds almost only on krill, of which \
it takes about four tonnes of krill a day[citation:1]. Its song can be heard over 1,600 kilometres[citation:3].

Fin whales were seen in Atlantis by Captain Nemo[citation:2][citation:3].
"""
QUERIES = '["blue whale length", "what do blue whales eat"]'
THOUGHT = """\
The question is how many times the letter *r* occurs in "rorqual".

Spelling it out: r, o, r, q, u, a, l. The first letter is an r and so is the third. No other letter is.
"""
THOUGHT_ANSWER = "The letter *r* occurs **twice** in “rorqual”: first and third."
XSS = """\
<script>window.hit = 1</script><img src=x onerror="window.hit = 2"><svg onload="window.hit = 3"></svg>

[a](javascript:window.hit=4) [b](JaVaScRiPt:window.hit=5) [c](data:text/html,<script>window.hit=6</script>) \
[d](vbscript:x) <javascript:window.hit=7> ![x](javascript:window.hit=8) [e](&#106;avascript:window.hit=9)

<details open ontoggle="window.hit = 10"><iframe srcdoc="<script>parent.hit = 11</script>"></iframe></details>

\\[ \\href{javascript:window.hit=12}{click} \\includegraphics{javascript:window.hit=13} \\url{javascript:window.hit=14} \\]

$$\\htmlData{onclick=window.hit=15}{x} \\style{background:url(javascript:window.hit=16)}{y}$$

```mermaid
flowchart LR
  A["<img src=x onerror=window.top.hit=17>"] --> B[ok]
  click A href "javascript:window.hit=18"
```

```"><script>window.hit=19</script>
code
```

[citation:1<script>window.hit=20</script>] [^1] <a href="javascript:window.hit=21">x</a>

[^1]: <img src=x onerror=window.hit=22>
"""
ANSWERS = {
    "markdown": MARKDOWN,
    "maths": MATHS,
    "diagram": MERMAID,
    "page": HTML,
    "svg": SVG,
    "xss": XSS,
    "think": THOUGHT_ANSWER,
    "long": "\n\n".join(f"Paragraph {n}: the whale swam on, under the ice and past the islands." for n in range(1, 31)),
    "slow": " ".join(f"word{n}" for n in range(600)),
    "cut": " ".join(f"word{n}" for n in range(60)),
    "fault": "This is as far as it goes.",
    "chinese": "蓝鲸是已知最大的动物，体长可达 **30 米**。它几乎只吃磷虾。",
    "search": CITED,
}
THOUGHTS = {"think": THOUGHT, "slowly": THOUGHT * 3}
OTHER = "A rorqual is a whale with a pleated throat."

"""Answers that would make a browser fetch something, if it were to show them as they are meant."""

# What an answer may try: NAME becomes an address of another server, of its own for each form.
DIAGRAMS = {
    "img tag": 'graph TD\nA["<img src=NAME>"]',
    "image node": 'flowchart TD\nA@{ img: "NAME", label: "x", w: 60, h: 60 }',
    "css of a theme": '%%{init: {"themeCSS": "*{background-image:url(NAME)}"}}%%\ngraph TD\nA-->B',
    "css import": '%%{init: {"themeCSS": "@import url(NAME);"}}%%\ngraph TD\nA-->B',
    "font": '%%{init: {"fontFamily": "x;}@font-face{font-family:y;src:url(NAME)}*{font-family:y"}}%%\ngraph TD\nA-->B',
    "theme in front matter": '---\nconfig:\n  themeCSS: "rect{fill:url(NAME)}"\n---\ngraph TD\nA-->B',
    "style": "graph TD\nA-->B\nstyle A fill:url(NAME)",
    "class": "graph TD\nA-->B\nclassDef default background:url(NAME),fill:url(NAME)",
    "link": 'graph TD\nA-->B\nclick A href "NAME" _self',
    "icon": "graph TD\nA[fa:fa-x <img src=NAME>]",
    "sequence": "sequenceDiagram\nA->>B: <img src=NAME>",
    "class diagram": 'classDiagram\nclass A["<img src=NAME>"]',
    "state": "stateDiagram-v2\n[*] --> A: <img src=NAME>",
    "c4": 'C4Context\nPerson(a, "A", "x", $sprite="NAME")',
    "mind map": 'mindmap\n  root["<img src=NAME>"]',
    "journey": "journey\ntitle <img src=NAME>\nsection a\nb: 1: c",
    "pie": 'pie title <img src=NAME>\n"a" : 1',
    "block": 'block-beta\na["<img src=NAME>"]',
    "architecture": "architecture-beta\nservice a(logos:x)[<img src=NAME>]",
}
TAGS = {
    "img": "<img src=NAME>",
    "img upper case": "<IMG SRC='NAME'>",
    "img over two lines": "<img\nsrc=NAME>",
    "srcset": "<img srcset='NAME 1x'>",
    "picture": "<picture><source srcset=NAME><img></picture>",
    "svg": "<svg><image href=NAME /></svg>",
    "svg use": "<svg><use href='NAME#a'/></svg>",
    "svg style": "<svg><style>*{fill:url(NAME)}</style></svg>",
    "style": "<style>@import 'NAME';</style>",
    "style of a tag": "<div style='background:url(NAME)'>x</div>",
    "iframe": "<iframe src=NAME></iframe>",
    "srcdoc": "<iframe srcdoc='<img src=NAME>'></iframe>",
    "object": "<object data=NAME></object>",
    "embed": "<embed src=NAME>",
    "video": "<video src=NAME poster=NAME autoplay></video>",
    "audio": "<audio src=NAME autoplay></audio>",
    "track": "<video><track src=NAME default></video>",
    "script": "<script src=NAME></script>",
    "prefetch": "<link rel=prefetch href=NAME>",
    "preconnect": "<link rel=preconnect href=NAME>",
    "style sheet": "<link rel=stylesheet href=NAME>",
    "refresh": "<meta http-equiv=refresh content='0;url=NAME'>",
    "base": "<base href=NAME>",
    "form": "<form action=NAME><input type=image src=NAME></form>",
    "ping": "<a href=# ping=NAME>x</a>",
    "mermaid": "<div class=mermaid>graph TD\nA[\"<img src='NAME'>\"]</div>",
    "math": "<math><mglyph src=NAME></mglyph></math>",
    "template": "<template><img src=NAME></template>",
    "entities": "&lt;img src=NAME&gt;",
    "escaped": "\\<img src=NAME>",
    "comment": "<!--><img src=NAME>-->",
    "within a tag": "<<b>img src=NAME>",
    "details": "<details open ontoggle=fetch('NAME')>x</details>",
}
MARKDOWN = {
    "picture": "![x](NAME)",
    "picture by reference": "![x][a]\n\n[a]: NAME",
    "picture in a link": "[![x](NAME)](NAME)",
    "data": "![x](data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg'><image href='NAME'/></svg>)",
    "link": "[x](NAME) <NAME> NAME",
    "block that ends early": "```\nx\n```~\n<img src=NAME>\n![x](NAME)\n```",
    "formula within a block": "```\n$$<img src=NAME> ![x](NAME)$$\n```",
    "formula": "$$\\includegraphics{NAME} \\href{NAME}{x} \\htmlStyle{background:url(NAME)}{x} \\url{NAME}$$",
    "formula with a tag": "$$x <img src=NAME> y$$",
    "table": "|a|b|\n|-|-|\n|![x](NAME)|<img src=NAME>|",
    "list": "- x\n  - ![x](NAME)\n  - <img src=NAME>",
    "heading": "# ![x](NAME) <img src=NAME>",
    "block of html": "```html\n<img src=NAME>\n```",
    "block of svg": "```svg\n<svg><image href=NAME /></svg>\n```",
    "unclosed block": "```\n<img src=NAME>",
    "indented": "    <img src=NAME>\n\n\t![x](NAME)",
}


def attempts() -> dict[str, str]:
    """What each form is, and its text."""
    forms = {f"tag: {name}": text for name, text in TAGS.items()}
    forms |= {f"markdown: {name}": text for name, text in MARKDOWN.items()}
    for name, text in DIAGRAMS.items():
        forms[f"diagram: {name}"] = f"```mermaid\n{text}\n```"
    text = DIAGRAMS["img tag"]
    forms["diagram of four ticks"] = f"````mermaid\n{text}\n````"
    forms["diagram of tildes"] = f"~~~mermaid\n{text}\n~~~"
    forms["diagram with spaces"] = f"```mermaid \t\n{text}\n```"
    forms["diagram in a list"] = "- x\n\n" + "\n".join("  " + line for line in f"```mermaid\n{text}\n```".split("\n"))
    forms["diagram in a quote"] = "\n".join("> " + line for line in f"```mermaid\n{text}\n```".split("\n"))
    forms["diagram in a block"] = f"`````\n```~\n```mermaid\n{text}\n```\n`````"
    forms["diagram with other ends of lines"] = f"```mermaid\r{text}\r```"
    return forms

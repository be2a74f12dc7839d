"""Short texts of many kinds: what an encoder is measured on when neither a population nor examples are given."""

from __future__ import annotations

from lopa_exporters.data import Example

_PAIRS = (
    ("The committee met on Tuesday to discuss the new bridge over the river. After two hours of debate,", " the members agreed to wait."),
    ("Dear Ms. Alvarez, thank you for your order of 14 March. Unfortunately one of the items", " is out of stock until next week."),
    ("def read_lines(path):\n    with open(path, encoding='utf-8') as file:\n", "        return file.read().splitlines()\n"),
    ("Remind me to call the dentist", " tomorrow at nine."),
    ("import json\nimport sys\n\n\ndef main():\n    data = json.load(sys.stdin)\n", "    print(json.dumps(data, indent=2))\n"),
    ("Whisk the eggs with the sugar until pale, then fold in the flour and the melted butter. Pour into", " a greased tin."),
    ("Summarize: revenue rose by 12 percent to 4.1 billion, while operating costs fell for the third quarter in a row.", " Profit grew."),
    (
        "class Stack:\n    def __init__(self):\n        self._items = []\n\n    def push(self, item):\n",
        "        self._items.append(item)\n",
    ),
    ("Is the museum open on public holidays?", " Yes, from ten to four."),
    ('{"id": 17, "name": "Ada", "tags": ["admin", "ops"], "active":', " true}"),
    (
        "We walked along the coast for most of the afternoon. The wind had dropped, and far out a single sail",
        " stood white against the sky.",
    ),
    ("SELECT name, count(*) FROM orders WHERE created > '2024-01-01'", " GROUP BY name ORDER BY 2 DESC;"),
    ("Translate to French: good morning, how are you?", " Bonjour, comment allez-vous ?"),
    ("for (int i = 0; i < n; i++) {\n    total += values[i];\n", "}\nreturn total / n;\n"),
    ("Patient reports mild headaches since Monday, no fever, no nausea. Advised rest and", " plenty of fluids."),
    ("git commit -m 'Fix rounding of prices in the cart' &&", " git push origin main"),
    ("ok", " thanks"),
    ("The second law of thermodynamics says that the entropy of an isolated system", " never decreases."),
    ("Your parcel was handed to the carrier this morning and should arrive", " between two and four o'clock."),
    ("try:\n    value = int(text)\nexcept ValueError as error:\n", "    raise ConfigError(f'{text!r} is not a number') from error\n"),
    ("Q: What is the capital of Australia?\nA:", " Canberra."),
    ("# Release notes\n\n- Faster start on older phones\n- Fixed a crash when the network drops\n", "- New icons\n"),
    ("lol that's hilarious, send me the link when you get home", " please"),
    ("The parties agree that any dispute arising from this contract shall be settled by", " arbitration in Geneva."),
)
PROBES = tuple(Example("probe", "probe", prompt, target) for prompt, target in _PAIRS)

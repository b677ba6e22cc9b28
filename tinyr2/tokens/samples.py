r"""Texts of five kinds on which two tokenizers can be compared: what each kind is made of is where tokenizers differ.

In: nothing. Out: `SAMPLES`, the texts by kind, of 1 to 2 kB each. Joiners and variation selectors are written as
escapes, since they cannot be seen.
"""

PROSE = """\
The ferry left at a quarter past six, which was late even for a Sunday. "We'll be there before dark," said the mate, \
who had said so on every crossing since 1987; nobody believed him, and nobody minded. Rain drummed on the roof.

By the harbor wall a woman in a yellow raincoat was counting crates: forty-one, forty-two — no, that one was hers. She \
had paid £12.50 for the lot, or $15.80 at Friday's rate, and she wasn't going to lose a single mackerel over it.

Dr. Anneliese Müller-Østergård, naïve as she was about boats, had brought a cello. It rode in the wheelhouse, \
wrapped in two blankets and an out-of-date chart of the Kattegat. "Is it heavy?" asked the boy. "It's air," she said. \
"Air and varnish. The heavy part is learning to leave it alone."

They talked about re-entry, co-operation, the price of diesel; about his grandmother, who had un-, dis- and \
mis-remembered the same summer three different ways; about whether one says "to whom" any more. At 21:40 the lights of \
the town came up all at once, like a sentence that finally finds its verb.

Later, in the café, he wrote a postcard. It read, in full: "Arrived. Soaked. The cello is dry. Don't wait up!"
"""

MATHS = r"""Problem 7. A tank holds 3,600 litres; one pump fills it in 48 minutes, another empties it
in 80. How long until it is full if both run?

Rates: $r_1 = 3600/48 = 75$ and $r_2 = 3600/80 = 45$, so $r_1 - r_2 = 30$ litres/min, $t = \frac{3600}{30} = 120$.
Check: 120*75 - 120*45 = 9000 - 5400 = 3600. Answer: \boxed{120}

Problem 8. Show that $\sum_{k=1}^{n} k^3 = \left(\frac{n(n+1)}{2}\right)^2$ for all $n \in \mathbb{N}$.
For $n=1$ both sides are 1. If it holds for $n$, then
\begin{align}
  \left(\frac{n(n+1)}{2}\right)^2 + (n+1)^3 &= (n+1)^2\left(\frac{n^2}{4} + n + 1\right) \\
  &= \left(\frac{(n+1)(n+2)}{2}\right)^2. \qquad\blacksquare
\end{align}

Problem 9. Work out 58-36+91-1007 column by column.
58-36=22; 22+91=113; 113-1007=-894. #### -894

Numbers: 0, 00, 007, 1000000, 1234567890, 3.14159265358979, 6.02214076e23, -0.5, 1e-9, 99.99%,
2^64 = 18446744073709551616, 12/25/2024, 0x1F, 1,234,567.89.
Signs: α ≤ β < γ, ∀ε>0 ∃δ>0, x ∈ ℝ∖{0}, ∫₀¹ x² dx = ⅓, √2 ≈ 1.414, a⃗·b⃗ = 0, A ⊂ B ∪ C, p ⇒ q, 90°, ±½.
"""

CODE = '''\
from __future__ import annotations

import re, sys
from dataclasses import dataclass, field


@dataclass(slots=True)
class Ledger:
    """Amounts in cents, by account."""
    entries: dict[str, list[int]] = field(default_factory=dict)

    def post(self, name: str, cents: int = 0) -> int:
        if not re.fullmatch(r"[a-z_]\\w{0,15}", name):
            raise ValueError(f"bad account: {name!r}")
        rows = self.entries.setdefault(name, [])
        rows.append(cents)
        return sum(x for x in rows if x >= 0) - sum(-x for x in rows if x < 0)


if __name__ == "__main__":
    book = Ledger()
    for line in sys.stdin:
        who, _, amount = line.rstrip("\\n").partition("\\t")
        print(who, book.post(who, int(amount, 10)), sep=" => ")

// the same in C, with tabs
#include <stdint.h>
static inline uint32_t rotl32(uint32_t x, int n) {
\treturn (x << (n & 31)) | (x >> (-n & 31));\t/* n == 0 is fine */
}

for (let i = 0; i <= rows.length - 1; i++) { total += rows[i]?.amount ?? 0; }   // trailing spaces   \n\
SELECT c.name, COUNT(*) AS n FROM customers c LEFT JOIN orders o ON o.customer_id = c.id GROUP BY 1 HAVING n > 10;
{"id": 17, "tags": ["a", "b_c", "snake_case", "camelCase", "SCREAMING_CASE"], "ok": true, "ratio": null}
$ git diff --stat HEAD~3 -- 'src/**/*.rs' | tail -n 1 && echo "done: $?" >> /tmp/log.txt
'''

CHINESE = """\
渡船六点一刻才开，就算是星期天也算晚了。“天黑以前一定到！”大副说——这话他从1987年起每次过海都说；没有人信，也没有人在意。雨点敲着油布，\
声音像豆子落进铁锅。

码头边，一位穿黄色雨衣的妇人正在数箱子：四十一、四十二……不，那一只本来就是她的。她一共付了12.50英镑（按周五的汇率约合人民币１１３元），一条鱼也不肯少。

例题：小明有24个苹果，分给3个同学，每人得到几个？
解：24÷3＝8（个）。答：每人得到8个。
若速度v＝60km/h，时间t＝2.5h，则路程s＝v×t＝150km。

《说文解字》里讲：“文者，物象之本；字者，言孳乳而浸多也。”今天我们用的简化字，繁體字，異體字，乃至罕见字如“龘”“靐”“𠮷”“𣎴”，都还在被人输入。
常用词：人工智能、强化学习、知识蒸馏、分词器、上下文、注意力机制；成语：画龙点睛、亡羊补牢、不亦乐乎。
中英混排：用Python写一个for循环，然后push到GitHub上，OK？电话：010-8888 6666，网址：example.com/路径?q=中文。
日本語も少し：東京タワーへ行きました。カタカナとひらがな、漢字まじり文。한국어 한 줄: 안녕하세요, 세계!
"""

EMOJI = """\
Shipped it 🚀🚀🚀 thanks to everyone 🙏 and sorry about Friday 😅😬
team: 👩\u200d💻 👨🏽\u200d🔬 🧑🏿\u200d🚀 👩🏻\u200d🤝\u200d👨🏾 family: 👨\u200d👩\u200d👧\u200d👦 👩\u200d👩\u200d👦
hands 👍👍🏻👍🏼👍🏽👍🏾👍🏿 👋🏽 🤞🏼 ✌\ufe0f ☝🏾 🫶🏿 hearts ❤\ufe0f 🧡💛💚💙💜🖤🤍 ❤\ufe0f\u200d🔥 ❤\ufe0f\u200d🩹
flags 🇩🇪🇫🇷🇯🇵🇧🇷🇿🇦 🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f 🏳\ufe0f\u200d🌈 🏴\u200d☠\ufe0f
keycaps 1\ufe0f\u20e32\ufe0f\u20e3#\ufe0f\u20e3 arrows ⬆\ufe0f↗\ufe0f➡\ufe0f weather ☀\ufe0f🌤\ufe0f⛈\ufe0f🌡\ufe0f
food 🍕🍣🥐🧀🫐🍄 animals 🦊🦉🐙🦩🐻\u200d❄\ufe0f🐈\u200d⬛ sport ⛹🏽\u200d♀\ufe0f🚴🏻\u200d♂\ufe0f🏄🏾
mood today: 😀➡\ufe0f😐➡\ufe0f😭 (don't ask) ¯\\_(ツ)_/¯ (╯°□°)╯︵ ┻━┻
new ones 🫠🫡🫥🪩🪿🫎 old ones ☎\ufe0f✉\ufe0f✂\ufe0f text style ☺\ufe0e ♥\ufe0e ©™®
combining: e\u0301 u\u0308 n\u0303 a\u030a\u0301 Z\u0351\u036b\u0343a\u0329\u0316l\u0348g\u0331o\u0321 \
q\u0307\u0323 क्\u200dष क्षि தமி ไทยก็ นี้
math letters 𝕳𝖊𝖑𝖑𝖔 𝒲𝑜𝓇𝓁𝒹 𝟙𝟚𝟛 wide ＡＢＣ１２３ circled ①②③ Ⓐ boxes ▁▂▃▄▅▆▇█
score 3\ufe0f\u20e3–0 ⚽🥅 10/10 💯 would merge again ✅❌⚠\ufe0f
"""

SAMPLES = {"prose": PROSE, "maths": MATHS, "code": CODE, "chinese": CHINESE, "emoji": EMOJI}

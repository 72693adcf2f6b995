"""Chat templates in the two styles that there are, and conversations."""

import random


MARKED = (
    "{% for message in messages %}{{ '<bos>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<eos>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<eos>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bos>assistant\n' }}{% endif %}"
)
DIFFERENCE = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
WORDS = ["def", "class", "return", "import", "the", "from", "yield", "ünïcode", "日本語", "lambda", "as", "reference"]


def conversations(number, seed=0):
    """`number` conversations of one to four exchanges, some with a system message."""
    choose = random.Random(seed)

    def words(most):
        return " ".join(choose.choices(WORDS, k=choose.randint(1, most)))

    rows = []
    for _ in range(number):
        messages = [{"role": "system", "content": words(5)}] if choose.random() < 0.3 else []
        for _ in range(choose.randint(1, 4)):
            messages += [{"role": "user", "content": words(9)}, {"role": "assistant", "content": words(20)}]
        rows.append({"messages": messages})
    return rows

"""Messages of which the tests make rows."""

from typing import Any

Row = dict[str, Any]

SYSTEM = {"role": "system", "content": "Answer in one word."}
QUESTION = {"role": "user", "content": "What is the capital of France? 🗼"}
CHOSEN = {"role": "assistant", "content": "Paris."}
REJECTED = {"role": "assistant", "content": "Lyon, I believe."}
EARLIER_TURN = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi!"}]

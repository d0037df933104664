"""Many users at once: is an answer ever wrong or refused, how long does the first token take, does memory grow?

    python benchmarks/chat_load.py [--model RUN] [--users 20] [--seconds 120]

Starts a chat of its own. Each user asks about a picture of their own, again and again; every answer is compared with
what ``generate`` says to the same prompt.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from contextlib import nullcontext
from pathlib import Path

import psutil
import torch
from gradio_client import Client, handle_file
from peft import PeftModel

from fura_vlm.chat.models import default_model
from fura_vlm.chat.prompt import Exchange, build_prompt, encode
from fura_vlm.embedded.scenes import draw, make_scene
from fura_vlm.modelling.load import load_any

QUESTION = "What does the sign say?\nAnswer the question using a single word or phrase."
LENGTH = 24

parser = argparse.ArgumentParser(description="Many users at once.")
parser.add_argument("--model", default=default_model())
parser.add_argument("--users", type=int, default=20)
parser.add_argument("--seconds", type=float, default=120)
options = parser.parse_args()


def expected_answers(scenes: list[str]) -> dict[tuple[str, str], str]:
    """By scene, and name of what answers."""
    model, family = load_any(options.model)
    answers = {}
    names = [Path(options.model).name, "base"] if isinstance(model, PeftModel) else ["base"]
    for name in names:
        off = name == "base" and isinstance(model, PeftModel)
        with torch.inference_mode(), model.disable_adapter() if off else nullcontext():
            for scene in scenes:
                prompt = build_prompt([Exchange(QUESTION, scene)], family, 900)
                inputs = {key: value.to(model.device) for key, value in encode(prompt, family).items()}
                inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
                ids = model.generate(**inputs, do_sample=False, max_new_tokens=LENGTH)
                written = ids[0, inputs["input_ids"].shape[1] :]
                answers[scene, name] = family.tokenizer.decode(written, skip_special_tokens=True).strip()
    return answers


def talk(address: str, scene: str, expected: dict, until: float, firsts: list[float], wrong: list) -> None:
    user = Client(address, verbose=False)
    names = [name for known, name in expected if known == scene]
    turn = 0
    while time.monotonic() < until:
        name = names[turn % len(names)]
        turn += 1
        try:
            message, asked = {"text": QUESTION, "files": [handle_file(scene)]}, time.monotonic()
            first, answer = None, ""
            for answer in user.submit(message, model=name, max_new_tokens=LENGTH, api_name="/chat"):
                if answer and first is None:
                    first = time.monotonic() - asked
            firsts.append(first if first is not None else time.monotonic() - asked)
            if answer != expected[scene, name]:
                wrong.append((scene, name, answer, expected[scene, name]))
            user.predict(api_name="/clear")
        except Exception as error:
            wrong.append((scene, name, repr(error)))


with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
    scenes = [f"{folder}/{number}.png" for number in range(options.users)]
    for number, scene in enumerate(scenes):
        draw(make_scene(11, "eval", number, with_sign=True)).save(scene)
    expected = expected_answers(scenes)
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
    free.close()
    command = ["-m", "fura_vlm.cli", "chat", "--web", "--model", options.model, "--port", str(port)]
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    server = subprocess.Popen([sys.executable, *command], env=environment)
    try:
        address = f"http://127.0.0.1:{port}"
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except OSError:
                if server.poll() is not None:
                    sys.exit("the chat did not start")
                time.sleep(0.2)
        alone: list[float] = []
        wrong: list = []
        talk(address, scenes[0], expected, time.monotonic() + 5, alone, wrong)
        firsts: list[float] = []
        until = time.monotonic() + options.seconds
        arguments = [(address, scene, expected, until, firsts, wrong) for scene in scenes]
        users = [threading.Thread(target=talk, args=each) for each in arguments]
        for user in users:
            user.start()
        process, memory = psutil.Process(server.pid), []
        while any(user.is_alive() for user in users):
            memory.append(process.memory_info().rss / 2**20)
            time.sleep(1)
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            state = json.load(answer)
    finally:
        server.terminate()
        server.wait()

quarter = max(1, len(memory) // 4)
print(f"questions             {len(firsts)} by {options.users} users in {options.seconds:.0f} s")
print(f"different answers     {len(set(expected.values()))} of {len(expected)}")
print(f"wrong or refused      {len(wrong)} {wrong[:2] if wrong else ''}")
print(f"first token, alone    median {statistics.median(alone):.2f} s, longest {max(alone):.2f} s")
print(f"first token, together median {statistics.median(firsts):.2f} s, longest {max(firsts):.2f} s")
for part in range(4):
    span = memory[part * quarter : (part + 1) * quarter] or memory[-1:]
    print(f"memory, quarter {part + 1}     {statistics.mean(span):.0f} MiB")
print(f"afterwards            {state}")
sys.exit(bool(wrong))

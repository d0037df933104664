"""Asks a chat that is being served about pictures, through Gradio's client.

    bash scripts/demo.sh                       serves it
    python demo/client.py PICTURE [QUESTION]   asks

One ``Client`` is one conversation: a question without a picture is about those sent before.
"""

import argparse

from gradio_client import Client, handle_file

parser = argparse.ArgumentParser(description="Ask a chat that is being served about a picture.")
parser.add_argument("picture")
parser.add_argument("question", nargs="?", default="What is in the picture?")
parser.add_argument("--address", default="http://127.0.0.1:7860")
parser.add_argument("--auth", metavar="NAME:PASSWORD")
options = parser.parse_args()

client = Client(options.address, auth=options.auth and tuple(options.auth.split(":", 1)), verbose=False)
message = {"text": options.question, "files": [handle_file(options.picture)]}

shown = 0
for answer in client.submit(message, max_new_tokens=64, api_name="/chat"):  # the answer as far as it is written
    print(answer[shown:], end="", flush=True)
    shown = len(answer)
print()

# The whole answer at once, to a second question about the same picture:
print(client.predict({"text": "Are you sure?", "files": []}, max_new_tokens=64, api_name="/chat"))
client.predict(api_name="/clear")

"""The head on a model of transformers: CLIP, SigLIP or SigLIP 2.

    python examples/hugging_face.py --model openai/clip-vit-base-patch32

Without --model it makes a tiny CLIP with random weights, writes it as transformers does, and goes on as with any other.
"""

import argparse
import tempfile

import torch
import torch.nn.functional as F
from PIL import Image

from rada import RAdaCLIP, RAdaHead
from rada.models import ModelSpec

COLOURS, STEPS = ("red", "green", "blue", "yellow"), 30


def write_tiny_clip(folder: str) -> None:
    """A CLIPModel of width 16 over letters, with its processor, by save_pretrained."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    pieces = [chr(code) + end for code in range(33, 127) for end in ("", "</w>")]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    end = len(vocabulary) - 1
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = tower | {"vocab_size": end + 1, "bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    vision = tower | {"image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(images, CLIPTokenizer(vocab=vocabulary, merges=[])).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a name of the Hugging Face hub's, or a folder")
    name = parser.parse_args().model
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        if name is None:
            write_tiny_clip(folder)
        encoders = ModelSpec(f"transformers:{name or folder}").open(torch.device("cpu"))
    model = RAdaCLIP(encoders, RAdaHead(encoders.embed_dim), COLOURS)

    images = torch.stack([model.preprocess(Image.new("RGB", (64, 64), colour)) for colour in COLOURS])
    optimizer = torch.optim.Adam(model.head.parameters(), lr=1e-2)
    for step in range(1, STEPS + 1):
        logits, penalty = model(images, return_penalty=True)
        loss = F.cross_entropy(logits, torch.arange(len(COLOURS))) + 0.1 * penalty
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.3f}, {[COLOURS[i] for i in logits.argmax(-1)]}")


if __name__ == "__main__":
    main()

"""
How loss is measured: over a whole split, deterministic, in nats per token, every model on the same tokens.

    python evaluate.py --out_dir=out/fold_shakespeare
"""
import math
import os

from configurator import configure

out_dir = ''        # folder of the run; '' takes the newest under out/
data_dir = 'data'   # folder of the prepared data sets
device = 'auto'     # 'auto' takes cuda, mps or cpu, the first that is there
results_file = ''   # JSON file that gets the figures, too
if __name__ == '__main__':
    config = configure(globals())

import torch  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from model import FoldGPT  # noqa: E402

STREAMS = 16         # parallel streams in which a fold reads a split
MIN_SEGMENTS = 32    # a stream is not made shorter than this, as each of them starts without context
BLOCKS = 100         # contiguous stretches of tokens behind a standard error


@torch.no_grad()
def token_losses(model, tokens):
    """The loss of every token of a text but the first, given the text before it.

    A FoldGPT reads contiguous streams, carry kept. A GPT's windows advance by half their width and score their
    second half (the first one all of itself), so that it is not judged on cold starts.

    Args:
        model: GPT or FoldGPT; evaluated without dropout, and left in the mode it came in.
        tokens (N,) int64, on the model's device; N >= 2.
    Returns:
        (N - 1,) float32 on the CPU: nats of tokens[1:], in their order.
    """
    was_training = model.training
    model.eval()
    score = fold_losses if isinstance(model, FoldGPT) else gpt_losses
    losses = score(model, tokens[:-1], tokens[1:])
    model.train(was_training)
    return losses


def fold_losses(model, idx, targets):
    """token_losses of a fold: R streams side by side, a few segments a call."""
    n, l = len(idx), model.config.segment_size
    R = max(1, min(STREAMS, n // (MIN_SEGMENTS * l)))
    S = -(-n // (R * l)) * l  # tokens of a stream, whole segments
    rows, answers = (F.pad(t, (0, R * S - n)).view(R, S) for t in (idx, targets))
    width = max(1, tokens_per_call(model) // (R * l)) * l
    losses, carry = [], None
    for x, y in zip(rows.split(width, dim=1), answers.split(width, dim=1)):
        logits, _, carry = model(x, carry=carry, all_logits=True)
        losses.append(per_token(logits, y))
    return torch.cat(losses, dim=1).flatten()[:n]  # the padding stands at the end of the last stream


def gpt_losses(model, idx, targets):
    """token_losses of a GPT: windows of w tokens with a stride of half that."""
    n, w = len(idx), model.config.block_size
    h = max(1, w // 2)
    count = 1 + max(0, -(-(n - w) // h))
    x, y = (F.pad(t, (0, w + (count - 1) * h - n)).unfold(0, w, h) for t in (idx, targets))  # (count, w)
    rows = max(1, tokens_per_call(model) // w)
    losses = torch.cat([per_token(model(a, all_logits=True)[0], b) for a, b in zip(x.split(rows), y.split(rows))])
    return torch.cat((losses[0, :w - h], losses[:, w - h:].flatten()))[:n]


def per_token(logits, targets):
    """logits (B, T, V), targets (B, T) -> nats (B, T) on the CPU."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction='none').view(targets.shape).cpu()


def tokens_per_call(model):
    """As many tokens as keep the logits of a call near 256 MB, 8192 at most."""
    return min(8192, 2 ** 26 // model.config.vocab_size)


def mean_and_error(losses):
    """Mean of losses (N,), and its standard error from contiguous blocks: neighboring tokens are not independent."""
    size = max(1, len(losses) // BLOCKS)
    blocks = losses[:len(losses) // size * size].view(-1, size).double().mean(dim=1)
    return losses.double().mean().item(), (blocks.std() / len(blocks) ** 0.5).item() if len(blocks) > 1 else 0.0


def by_place(model, tokens):
    """Mean loss at each place of a segment, or of a window that starts cold: (l,) or (W,) nats; (0,) of a text without any."""
    fold = isinstance(model, FoldGPT)
    W = model.config.segment_size if fold else model.config.block_size
    if len(tokens) <= W:
        return torch.zeros(0)
    if fold:
        losses = token_losses(model, tokens)
    else:  # windows side by side
        n = (len(tokens) - 1) // W * W
        x, y = tokens[:n].view(-1, W), tokens[1:n + 1].view(-1, W)
        with torch.no_grad():
            losses = torch.cat([per_token(model(a, all_logits=True)[0], b) for a, b in zip(x.split(256), y.split(256))])
    losses = losses.flatten()
    return losses[:len(losses) // W * W].view(-1, W).mean(dim=0)


def validation_ids(saved, path, data_dir):
    """The validation split of the data set that a checkpoint was trained on: (N,) uint16, a NumPy array.

    saved, path: the checkpoint's dictionary and where it comes from, for the messages.
    Raises SystemExit if it names no data set, or if what is in data_dir has another text or other tokens.
    """
    import numpy as np

    import checkpoint as ckpt
    from prepare import load_meta
    if 'data' not in saved:
        raise SystemExit(f"error: {path} does not name its data set: name a run of train.py with --out_dir")
    folder = os.path.join(ckpt.ROOT, data_dir, saved['data']['dataset'])
    meta = load_meta(folder)
    if meta['sha256'] != saved['data']['sha256'] or meta['tokenizer'] != saved['tokenizer']:
        raise SystemExit(f"error: {folder} is not what {path} was trained on (another text or tokenizer): prepare that again")
    return np.fromfile(os.path.join(folder, 'val.bin'), dtype=np.uint16)


def main():
    """Score a run's ckpt.pt on the validation split of the data set that it was trained on."""
    import numpy as np

    import checkpoint as ckpt
    where = ckpt.pick_device(device)
    path = ckpt.find_file(os.path.join(ckpt.ROOT, out_dir) if out_dir else ckpt.newest_run())
    saved = ckpt.load(path, where)
    model = ckpt.load_model(saved, device=where).eval()
    tokens = torch.from_numpy(validation_ids(saved, path, data_dir).astype(np.int64)).to(where)
    losses = token_losses(model, tokens)
    mean, error = mean_and_error(losses)
    if not math.isfinite(mean):
        raise SystemExit(f"error: the loss of {path} is {mean}: its weights give no number")
    places = [round(loss, 4) for loss in by_place(model, tokens).tolist()]
    kind = 'segment, carry kept' if isinstance(model, FoldGPT) else 'window, starting cold'
    print(f"{saved['model_type']}, iteration {saved['iter_num']}: {mean:.4f} +- {error:.4f} nats per token, "
          f"{len(losses):,} tokens of {saved['data']['dataset']}")
    if places:
        print(f"by place in the {kind}: {' '.join(f'{loss:.2f}' for loss in places)}")
    if results_file:
        ckpt.save_result(results_file, {
            'model': saved['model_type'], 'sizes': saved['model_args'], 'loss': mean, 'error': error, 'tokens': len(losses),
            'by_place': places, 'iterations': saved['iter_num'], 'config': ckpt.portable(saved['config']),
            'trained': saved['provenance'], 'evaluated': ckpt.provenance(where)})


if __name__ == '__main__':
    main()

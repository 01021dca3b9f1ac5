"""Held-out loss as one sum over tokens, and as bits per byte: the bytes that each token stands for."""

import math

import torch


def score(trainer, dataset):
    """Sum a held-out set's loss over this rank's rows, every world_size-th; all ranks make as many forwards.

    Returns:
        float64 [3]: nats, tokens scored, bytes. Short of rows where a stop was asked for between two batches; then
        trainer.evaluation_owed.
    """
    args, model = trainer.args, trainer.model_wrapped
    sums = torch.zeros(3, dtype=torch.float64, device=args.device)
    mine = range(args.process_index, math.ceil(len(dataset) / args.world_size) * args.world_size, args.world_size)
    for start in range(0, len(mine), args.per_device_eval_batch_size):
        rows = mine[start : start + args.per_device_eval_batch_size]
        batch = trainer.data_collator([dataset[row % len(dataset)] for row in rows])
        batch["labels"][torch.tensor([row >= len(dataset) for row in rows])] = -100
        targets = batch["labels"][:, 1:]
        targets = targets[targets != -100]
        tokens = torch.tensor(len(targets))
        size = torch.tensor(0) if trainer.bytes_per_token is None else trainer.bytes_per_token[targets].sum()
        if trainer.model_accepts_loss_kwargs:
            batch["num_items_in_batch"] = torch.ones((), device=args.device)  # the loss is then a sum
        loss = model(**trainer._prepare_inputs(batch)).loss.double()
        nats = loss if trainer.model_accepts_loss_kwargs else loss * tokens
        sums += torch.stack((nats, tokens.to(nats), size.to(nats)))
        trainer.control = trainer.callback_handler.on_prediction_step(args, trainer.state, trainer.control)
        trainer.evaluation_owed = not trainer.control.should_evaluate
        if trainer.evaluation_owed:
            break
    return sums


def figures(sums, prefix):
    """{prefix_loss: nats a token, prefix_tokens, prefix_bits_per_byte where bytes were counted} of `score`'s sums."""
    nats, tokens, size = sums.tolist()
    found = {f"{prefix}_loss": nats / tokens, f"{prefix}_tokens": int(tokens)}
    return found | ({f"{prefix}_bits_per_byte": nats / size / math.log(2)} if size else {})


def bytes_per_token(tokenizer, texts):
    """Count the UTF-8 bytes of each token, if that can be trusted: it must add up on every one of some texts.

    Args:
        texts: Texts to try it on; of held-out ones a few dozen will do.

    Returns:
        int64 [len(tokenizer)], 0 for special tokens; None for a tokenizer whose tokens do not add up to the text, such
        as one that normalizes it or puts a space before it.
    """
    names, special = tokenizer.convert_ids_to_tokens(range(len(tokenizer))), set(tokenizer.all_special_ids)
    ways = (
        len,  # byte-level BPE: one character of its alphabet is one byte
        lambda name: 1 if name.startswith("<0x") and len(name) == 6 else len(name.replace("\u2581", " ").encode()),
    )
    texts = [text for text in texts if text]
    for way in ways:
        sizes = torch.tensor([0 if n in special else way(name) for n, name in enumerate(names)])
        encoded = (tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids for text in texts)
        if texts and all(
            sizes[ids].sum() == len(text.encode()) for ids, text in zip(encoded, texts, strict=True) if ids
        ):
            return sizes
    return None

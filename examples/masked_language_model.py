"""Train a BERT from scratch by masked language modelling on text files, with or without decorrelation.

    python examples/masked_language_model.py --output_dir outputs/bert
    python examples/masked_language_model.py --output_dir outputs/bert-dbp --method dbp

Without --train_dir (a folder of .txt, .rst or .md files) the text is Python's own documentation. Lines that
decorrelation adds to a script like transformers' run_mlm.py are marked with (*). The saved model is a stock
BertForMaskedLM.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import BertConfig, BertForMaskedLM, HfArgumentParser, Trainer, TrainingArguments

from hf_dbp import DecorrelationArguments, DecorrelationCallback, decorrelate, fuse
from hf_dbp.records import RunRecord, arguments_record
from hf_dbp.training.optimizers import HiddenWithAdamW
from hf_dbp.training.recording import RecordingCallback

SPECIAL = ["[PAD]", "[UNK]", "[MASK]"]
PAD, _, MASK = range(3)
IGNORED = -100


@dataclass
class ScriptArguments:
    method: str = field(default="bp", metadata={"choices": ["bp", "dbp"], "help": "Plain or decorrelated backprop."})
    optimizer: str = field(default="adamw", metadata={"choices": ["adamw", "muon"], "help": "Of the weights."})
    layers: str = field(default="all", metadata={"choices": ["auto", "all", "block_inputs"], "help": "Decorrelated."})
    train_dir: str | None = field(default=None, metadata={"help": "Folder of .txt, .rst or .md files."})
    hidden_size: int = field(default=128, metadata={"help": "Width; heads are 32 wide, the MLP four times as wide."})
    num_layers: int = field(default=4, metadata={"help": "Blocks."})
    length: int = field(default=64, metadata={"help": "Tokens of a sequence."})
    vocabulary: int = field(default=4000, metadata={"help": "Size of the vocabulary learnt from the text."})


def texts(folder: str | None) -> list[str]:
    """Documents, in a fixed order."""
    if folder is None:
        return [text for _, text in sorted(topics.items())]
    files = sorted(file for file in Path(folder).rglob("*") if file.suffix in (".txt", ".rst", ".md"))
    return [file.read_text(encoding="utf-8", errors="replace") for file in files]


def learn_tokenizer(documents: list[str], size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(documents, trainers.WordPieceTrainer(vocab_size=size, special_tokens=SPECIAL))
    return tokenizer


def sequences(tokenizer: Tokenizer, documents: list[str], length: int) -> list[torch.Tensor]:
    """Paragraphs, cut to at most ``length`` tokens; shorter ones will be padded."""
    paragraphs = [paragraph for text in documents for paragraph in text.split("\n\n")]
    ids = [encoding.ids for encoding in tokenizer.encode_batch(paragraphs)]
    pieces = [one[i : i + length] for one in ids for i in range(0, len(one), length)]
    return [torch.tensor(piece) for piece in pieces if len(piece) > 4]


def masked(batch: list[torch.Tensor], generator: torch.Generator | None = None) -> dict[str, torch.Tensor]:
    """Mask 15 % of the tokens, at least one per batch."""
    ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=PAD)
    chosen = (torch.rand(ids.shape, generator=generator) < 0.15) & (ids != PAD)
    chosen[0, 0] |= not chosen.any()
    labels = ids.masked_fill(~chosen, IGNORED)
    return {"input_ids": ids.masked_fill(chosen, MASK), "attention_mask": (ids != PAD).long(), "labels": labels}


def main(arguments: list[str] | None = None) -> None:
    parser = HfArgumentParser((ScriptArguments, DecorrelationArguments, TrainingArguments))
    script, decorrelation, args = parser.parse_args_into_dataclasses(arguments or sys.argv[1:])
    args.remove_unused_columns, args.label_names, args.prediction_loss_only = False, ["labels"], True
    documents = texts(script.train_dir)
    held_out, seen = documents[::10], [text for i, text in enumerate(documents) if i % 10]
    tokenizer = learn_tokenizer(seen, script.vocabulary)
    train, validation = (sequences(tokenizer, some, script.length) for some in (seen, held_out))

    def collate(batch: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Collate validation batches; their masks are always the same."""
        return masked(batch, None if trainer.model.training else torch.Generator().manual_seed(len(batch)))

    torch.manual_seed(args.seed)
    sizes = {"hidden_size": script.hidden_size, "num_hidden_layers": script.num_layers}
    sizes |= {"num_attention_heads": script.hidden_size // 32, "intermediate_size": 4 * script.hidden_size}
    model = BertForMaskedLM(
        BertConfig(vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=script.length, **sizes)
    )
    record = RunRecord("pretraining", script.method, script.optimizer, args.seed)
    record.arguments = arguments_record(script, decorrelation, args)
    record.data = {"source": script.train_dir or "pydoc topics", "train": len(train), "validation": len(validation)}
    callbacks = [RecordingCallback(record)]
    if script.method == "dbp":  # (*)
        batch = masked(train[: args.per_device_train_batch_size], torch.Generator().manual_seed(0))
        decorrelate(model, script.layers, batch=batch)
        callbacks.append(DecorrelationCallback(decorrelation, seed=args.seed))
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, weight_decay=args.weight_decay)
    if script.optimizer == "muon":
        optimizer = HiddenWithAdamW(model, lr=args.learning_rate, weight_decay=args.weight_decay)
    data = {"train_dataset": train, "eval_dataset": validation, "data_collator": collate}
    trainer = Trainer(model, args, callbacks=callbacks, optimizers=(optimizer, None), **data)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    plain = fuse(model) if script.method == "dbp" else model  # (*)
    plain.save_pretrained(args.output_dir)
    tokenizer.save(str(Path(args.output_dir) / "tokenizer.json"))


if __name__ == "__main__":
    main()

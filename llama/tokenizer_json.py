"""Write a sentencepiece model as tokenizer.json, the file of Hugging Face's tokenizers library."""
from sentencepiece import SentencePieceProcessor

SPACE = "\u2581"                   # the character that stands for a space in sentencepiece's pieces


def tokenizer_json(sp: SentencePieceProcessor, special: dict[str, str]) -> dict:
    """Return the content of tokenizer.json for a sentencepiece BPE model.

    special: the pieces of unk_token, bos_token and eos_token.
    transformers can also read tokenizer.model itself, but then it forgets the pieces' scores and
    splits LLaMA 2's runs of spaces differently.
    Raises ValueError for a model that transformers would read differently.
    """
    vocab = {sp.id_to_piece(i): i for i in range(sp.get_piece_size())}
    ordinary = [i for i in vocab.values()
                if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i))]
    merges = make_merges(sp, ordinary, vocab)
    symbols = find_symbols(sp, ordinary, merges)
    check_is_readable(sp, ordinary, symbols)
    begins_with_space = sp.encode("a", out_type=str)[0].startswith(SPACE)
    normalizers = [replace(" ", SPACE)]
    decoders = [replace(SPACE, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    if begins_with_space:
        # sentencepiece puts a space before every text, and takes it away in decoding.
        normalizers = [{"type": "Prepend", "prepend": SPACE}, *normalizers]
        decoders = [*decoders, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    bos = special["bos_token"]
    return {
        "version": "1.0", "pre_tokenizer": None,
        "added_tokens": [added_token(vocab[piece], piece, piece in symbols)
                         for piece in [*special.values(), *symbols]],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "post_processor": {
            "type": "TemplateProcessing", "single": after_bos(bos, "A"),
            "pair": after_bos(bos, "A", "B"),
            "special_tokens": {bos: {"id": bos, "ids": [vocab[bos]], "tokens": [bos]}}},
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {"type": "BPE", "unk_token": special["unk_token"], "fuse_unk": True,
                  "byte_fallback": True, "vocab": vocab, "merges": merges}}


def make_merges(sp: SentencePieceProcessor, ordinary: list[int],
                vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Return the pairs of pieces that make up a piece, those of the highest score first.

    sentencepiece joins the neighbours that make the piece of the highest score, however that piece
    is cut in two.  In tokenizer.json every such cut is a merge of its own.
    """
    merges = []
    for i in sorted(ordinary, key=lambda i: -sp.get_score(i)):
        piece = sp.id_to_piece(i)
        for cut in range(1, len(piece)):
            if piece[:cut] in vocab and piece[cut:] in vocab:
                merges.append((piece[:cut], piece[cut:]))
    return merges


def find_symbols(sp: SentencePieceProcessor, ordinary: list[int],
                 merges: list[tuple[str, str]]) -> list[str]:
    """Return the pieces that sentencepiece finds in a text although no merge makes them."""
    merged = {first + second for first, second in merges}
    symbols = []
    for i in ordinary:
        piece = sp.id_to_piece(i)
        if len(piece) > 1 and piece not in merged and i in sp.encode(piece):
            symbols.append(piece)
    return symbols


def check_is_readable(sp: SentencePieceProcessor, ordinary: list[int], symbols: list[str]):
    """Raise ValueError for a model that transformers would read differently."""
    # In a BPE the scores are whole numbers: they count the merges.
    is_bpe = all(sp.get_score(i) % 1 == 0 for i in ordinary)
    # Runs of spaces are found in either library; transformers would look for others too early.
    has_other_symbols = not all(symbol.startswith(SPACE) for symbol in symbols)
    removes_spaces = sp.encode("a  b ") == sp.encode("a b")
    replaces_letters = sp.encode("\ufb01") == sp.encode("fi")       # U+FB01 is fi as one letter.
    if not is_bpe or has_other_symbols or removes_spaces or replaces_letters:
        raise ValueError("transformers would read this tokenizer.model differently (it is not a "
                         "BPE, has symbols of its own, or changes the text first); convert with "
                         "--to meta")


def replace(old: str, new: str) -> dict:
    """Return the step that replaces a text, for normalizer and decoder."""
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def added_token(i: int, piece: str, is_symbol: bool) -> dict:
    """Return the entry of a piece that is looked up in the text before any merge.

    A symbol is ordinary text, found after normalising; a special token is neither.
    """
    return {"id": i, "content": piece, "special": not is_symbol, "normalized": is_symbol,
            "single_word": False, "lstrip": False, "rstrip": False}


def after_bos(bos: str, *sequences: str) -> list[dict]:
    """Return the template of a text, or of a pair of texts, behind one bos."""
    template = [{"SpecialToken": {"id": bos, "type_id": 0}}]
    for sequence in sequences:
        template.append({"Sequence": {"id": sequence, "type_id": 0}})
    return template

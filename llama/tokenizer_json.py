"""A sentencepiece model in the words of Hugging Face's tokenizers library: tokenizer.json."""


def tokenizer_json(sp, special):
    """A sentencepiece BPE model in the words of the tokenizers library, which transformers runs.

    sentencepiece joins two neighbours into the piece of the highest score, however that piece is made; here each way
    to make a piece is a merge of its own, those of higher scores first.  transformers itself, given tokenizer.model
    alone, forgets the scores, and LLaMA 2's runs of spaces come out otherwise.
    """
    pieces = [sp.id_to_piece(i) for i in range(sp.get_piece_size())]
    vocab, space = {piece: i for i, piece in enumerate(pieces)}, "\u2581"
    plain = [i for i in vocab.values() if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i))]
    merges = [(pieces[i][:cut], pieces[i][cut:]) for i in sorted(plain, key=lambda i: -sp.get_score(i))
              for cut in range(1, len(pieces[i])) if {pieces[i][:cut], pieces[i][cut:]} <= vocab.keys()]
    reached = {first + second for first, second in merges}
    # Pieces there although nothing makes them, found in the text as it is by then.
    symbols = [pieces[i] for i in plain if len(pieces[i]) > 1 and pieces[i] not in reached and i in sp.encode(pieces[i])]
    if any(sp.get_score(i) % 1 for i in plain) or not all(symbol.startswith(space) for symbol in symbols) \
            or sp.encode("a  b ") == sp.encode("a b") or sp.encode("\ufb01") == sp.encode("fi"):
        raise ValueError("this tokenizer.model has no form that transformers would read alike (it is no BPE, has symbols of its "
                         "own, or changes the text first); convert with --to meta")
    prefix = sp.encode("a", out_type=str)[0].startswith(space)            # whether a text gets a space before it
    bos = special["bos_token"]

    def replace(old, new):
        return {"type": "Replace", "pattern": {"String": old}, "content": new}

    def template(*sequences):
        return [{"SpecialToken": {"id": bos, "type_id": 0}}, *({"Sequence": {"id": name, "type_id": 0}} for name in sequences)]
    return {
        "version": "1.0", "pre_tokenizer": None,
        "added_tokens": [{"id": vocab[piece], "content": piece, "special": piece not in symbols, "normalized": piece in symbols,
                          "single_word": False, "lstrip": False, "rstrip": False} for piece in [*special.values(), *symbols]],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": space}] * prefix + [replace(" ", space)]},
        "post_processor": {"type": "TemplateProcessing", "single": template("A"), "pair": template("A", "B"),
                           "special_tokens": {bos: {"id": bos, "ids": [vocab[bos]], "tokens": [bos]}}},
        "decoder": {"type": "Sequence", "decoders": [replace(space, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
                    + [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * prefix},
        "model": {"type": "BPE", "unk_token": special["unk_token"], "fuse_unk": True, "byte_fallback": True,
                  "vocab": vocab, "merges": merges}}

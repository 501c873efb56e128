"""Answers here or asks the marketplace, never by surprise.

client.py is the story, planning.py (offers, consent) and cloud.py (reservation, attempts) its second half. What they
stand on, in the order to read it:

    policy.py     what the owner allows: modes, caps, privacy, backends; and the configuration file
    checks.py     that a dataclass's fields are what they are said to be
    local.py      the two-method protocol of the local leg, and the signals that its answer is not good enough
    confidence.py how probably a local answer is wrong, as fitted beforehand on the bundle that gave it
    run.py        one request under way; receipt.py: who answered, why, at what cost
    offers.py     what a catalogue says, which offers are allowed, what this request costs with each
    market.py     catalogues, and which offers may be asked now
    ledger.py     money in integer nano-USD, and what must be remembered between processes, in one SQLite file
    breaker.py    when to leave an account, a model or an offer alone (pure functions)
    retry.py      how long to wait, and when to stop trying
    images.py     images re-encoded without metadata before they leave; request.py: what is sent
    transport.py  one HTTP request with its deadlines; worker.py: the thread that makes every deadline hold
    stream.py     a server-sent answer, decoded byte by byte
    errors.py     every failure, by what it says something about: account, network, model, offer, request
    doctor.py     entry: what is wrong, in words
    spend.py      entry: the ledger

The one dependency is httpx2, imported at the first request that may leave: it is maintained, typed, already required by
huggingface_hub, and tells when the first byte of a request is sent, which decides whether a failure may be billed.
Pillow is needed to send images. Nothing else of the project is imported.
"""

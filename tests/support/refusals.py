"""What a refusal is: one line, of a class of ours, that says the words. Knows no subject."""

import pytest


def refused(error, words, call, *arguments, **options):
    """The line with which a call is refused; the pattern `words` is found in it, where there is one."""
    with pytest.raises(error, match=words or None) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)

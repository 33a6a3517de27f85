# SPDX-License-Identifier: Apache-2.0
"""Speech and music as the tokens of a codec: language models that continue and generate audio."""

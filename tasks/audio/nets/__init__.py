# SPDX-License-Identifier: Apache-2.0
"""Parts of the audio language model: delays, attention and its cache, sampling, generation; tokenizers."""

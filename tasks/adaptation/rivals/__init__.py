# SPDX-License-Identifier: Apache-2.0
"""Published methods of adaptation at test time, and controls: adapters of one harness."""

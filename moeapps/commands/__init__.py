# SPDX-License-Identifier: Apache-2.0
"""One file per command of ``moeapps``; each has ``main(args) -> exit code``."""

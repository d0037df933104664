# Sourced by the test script: the tests of the chat drive a Chromium. On Debian as root it is installed once; where
# that is not possible those tests are skipped and say so.
if ! command -v chromium > /dev/null && [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
    echo "Setting up Chromium for the tests of the chat (first use only)"
    { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends chromium; } \
        > /dev/null || echo "Chromium could not be installed; the tests that need it are skipped" >&2
fi

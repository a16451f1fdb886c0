"""A client of Cloister's attested TLS with nothing of Cloister in it: the protocol is open.

    python attested.py MEASUREMENTS.json ROOT.pem HOST:PORT [PATH]

It prints the body of an HTTP answer, or says why the server is not the measured enclave: then nothing
was sent. ROOT.pem is AWS's Nitro root, or that of a development cluster.
"""
import http.client, json, socket, ssl, sys
from datetime import datetime, timedelta, timezone

import cbor2
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils

AWS_ROOT = "641a0321a3e244efe456463195d606317ed7cdcc3c1756e09893f3c68f79bb5b"  # SHA-256 of AWS's certificate
CMW = x509.ObjectIdentifier("1.3.6.1.5.5.7.1.35")  # the extension that carries the document (RFC 9999)
EVALUATED = (x509.BasicConstraints.oid, x509.KeyUsage.oid)
MAX_AGE, SKEW = timedelta(minutes=15), timedelta(minutes=5)


def refuse_unless(ok, why):
    if not ok:
        raise ValueError(why)


def check_certificate(cert, now):
    refuse_unless(cert.not_valid_before_utc - SKEW <= now <= cert.not_valid_after_utc + SKEW, "a certificate is not valid now")


def check_chain(chain, now):
    """Each certificate has issued the next one, all with ECDSA on P-384; the last one is no authority."""
    for depth, (cert, issuer) in enumerate(zip(chain, chain[:1] + chain)):
        check_certificate(cert, now)
        refuse_unless(isinstance(cert.public_key(), ec.EllipticCurvePublicKey) and cert.public_key().curve.name == "secp384r1"
                      and isinstance(cert.signature_hash_algorithm, hashes.SHA384), "a certificate is not of P-384")
        refuse_unless(not any(e.critical and e.oid not in EVALUATED for e in cert.extensions), "a certificate has an unknown critical extension")
        cert.verify_directly_issued_by(issuer)
        ca = cert.extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = cert.extensions.get_extension_for_class(x509.KeyUsage).value
        below = len(chain) - 2 - depth  # authorities between this one and the last certificate
        refuse_unless(ca.ca == usage.key_cert_sign == (below >= 0), "a certificate is used for what it is not for")
        refuse_unless(ca.path_length is None or below <= ca.path_length, "the chain is too long")


def matches(entry, pcrs):
    """Every register of the entry is in the document; the entry pins the workload and the code."""
    pinned = {name: value.lower() for name, value in entry.items() if name != "label"}
    refuse_unless("PCR16" in pinned and ("PCR0" in pinned or "PCR8" in pinned or {"PCR1", "PCR2"} <= pinned.keys()), "an entry pins too little")
    refuse_unless(all(len(value) == 96 for value in pinned.values()), "a register is not one SHA-384 digest")
    return all(pcrs.get(int(name.removeprefix("PCR")), b"").hex() == value for name, value in pinned.items())


def verify(der, measurements, root, now):
    """Raises an exception unless der is the certificate of a measured enclave."""
    cert = x509.load_der_x509_certificate(der)
    check_certificate(cert, now)
    wrapped = cert.extensions.get_extension_for_oid(CMW).value.value  # an OCTET STRING of 256 to 65535 bytes
    refuse_unless(wrapped[:2] == b"\x04\x82" and len(wrapped) == 4 + int.from_bytes(wrapped[2:4]), "the extension is malformed")
    media_type, document, kind = cbor2.loads(wrapped[4:])
    refuse_unless((media_type, kind) == ("application/aws-nitro-document", 4), "the extension holds no Nitro document")
    protected, unprotected, payload, signature = cbor2.loads(document)  # COSE_Sign1, RFC 9052
    refuse_unless(cbor2.loads(protected) == {1: -35} and not unprotected and len(signature) == 96, "the document is not signed with ES384")
    doc = cbor2.loads(payload)

    leaf = x509.load_der_x509_certificate(doc["certificate"])
    check_chain([root, *map(x509.load_der_x509_certificate, doc["cabundle"][1:]), leaf], now)
    signed = cbor2.dumps(["Signature1", protected, b"", payload])
    r, s = int.from_bytes(signature[:48]), int.from_bytes(signature[48:])
    leaf.public_key().verify(utils.encode_dss_signature(r, s), signed, ec.ECDSA(hashes.SHA384()))

    age = now - datetime.fromtimestamp(doc["timestamp"] / 1000, timezone.utc)
    refuse_unless(-SKEW <= age <= MAX_AGE, f"the document is {age} old")
    refuse_unless(doc["user_data"] == b"cloister/1 tls-server", "the document is not for a TLS server")
    spki = cert.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    refuse_unless(doc["public_key"] == spki, "the document attests another key than the connection's")
    refuse_unless(any(doc["pcrs"][0]), "the enclave runs in debug mode")
    refuse_unless(any([matches(e, doc["pcrs"]) for e in measurements["measurements"]]), "no measurement matches the enclave's registers")


def connect(host, port, measurements, root):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # verify() decides instead
    context.set_alpn_protocols(["http/1.1", "cloister/1"])  # the second asks for the attested certificate
    conn = context.wrap_socket(socket.create_connection((host, port), timeout=30), server_hostname=host, suppress_ragged_eofs=False)
    try:
        verify(conn.getpeercert(binary_form=True), measurements, root, datetime.now(timezone.utc))
    except Exception as why:
        conn.close()
        raise ConnectionError(f"refused, nothing was sent: {why!r}") from why
    return conn


if __name__ == "__main__":
    with open(sys.argv[1]) as m, open(sys.argv[2], "rb") as r:
        measurements, root = json.load(m), x509.load_pem_x509_certificate(r.read())
    host, _, port = sys.argv[3].rpartition(":")
    client = http.client.HTTPConnection(host, int(port))
    try:
        client.sock = connect(host, int(port), measurements, root)
    except ConnectionError as refused:
        sys.exit(f"attested.py: {refused}")
    if root.fingerprint(hashes.SHA256()).hex() != AWS_ROOT:
        print("DEVELOPMENT, not a real enclave", file=sys.stderr, flush=True)
    client.request("GET", sys.argv[4] if len(sys.argv) > 4 else "/")
    sys.stdout.buffer.write(client.getresponse().read())

use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM, Aad, Algorithm, LessSafeKey, Nonce, UnboundKey};
use rustls::ConnectionTrafficSecrets;

/// Encrypts TLS 1.3 records where they lie (RFC 8446, section 5.2).
pub struct Sealer(Direction);

/// Decrypts TLS 1.3 records where they lie.
pub struct Opener(Direction);

/// What a record carries (RFC 8446, section 5.1).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ContentType {
    Alert,
    Handshake,
    ApplicationData,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RecordError {
    #[error("a record that is none of TLS 1.3's came")]
    Malformed,
    #[error("a record could not be decrypted: it was changed on its way")]
    Forged,
    #[error("the keys of the connection cannot be used")]
    Keys,
}

impl Sealer {
    pub fn new(secrets: (u64, ConnectionTrafficSecrets)) -> Result<Self, RecordError> {
        Direction::new(secrets).map(Self)
    }

    /// Makes a record of `record`, whose first [`HEADER`] and last [`TRAILER`] bytes are room for what TLS adds.
    pub fn seal(&mut self, content: ContentType, record: &mut [u8]) -> Result<(), RecordError> {
        let inner_end = record.len().checked_sub(TAG).ok_or(RecordError::Malformed)?;
        let (record, tag) = record.split_at_mut(inner_end);
        let length = u16::try_from(inner_end + TAG - HEADER).map_err(|_| RecordError::Malformed)?.to_be_bytes();
        let (header, inner) = record.split_at_mut(HEADER);
        header.copy_from_slice(&[APPLICATION_DATA, LEGACY_VERSION[0], LEGACY_VERSION[1], length[0], length[1]]);
        *inner.last_mut().ok_or(RecordError::Malformed)? = content.code();
        let nonce = self.0.next_nonce()?;
        let sealed = self.0.key.seal_in_place_separate_tag(nonce, Aad::from(&*header), inner);
        tag.copy_from_slice(sealed.map_err(|_| RecordError::Keys)?.as_ref());
        Ok(())
    }

    /// Whether the next records want new keys: AES-GCM stays safe for 2^24.5 records of full size under one key
    /// (RFC 8446, section 5.5).
    pub fn is_worn(&self) -> bool {
        self.0.sequence >= MOST_RECORDS
    }
}

impl Opener {
    pub fn new(secrets: (u64, ConnectionTrafficSecrets)) -> Result<Self, RecordError> {
        Direction::new(secrets).map(Self)
    }

    /// What lies in a whole record, of which [`whole_record`] told the length: its type, and how many bytes from
    /// [`HEADER`] on it carries.
    pub fn open(&mut self, record: &mut [u8]) -> Result<(ContentType, usize), RecordError> {
        let (header, body) = record.split_at_mut_checked(HEADER).ok_or(RecordError::Malformed)?;
        let nonce = self.0.next_nonce()?;
        let inner = self.0.key.open_in_place(nonce, Aad::from(&*header), body).map_err(|_| RecordError::Forged)?;
        // RFC 8446, section 5.4: zeros behind the type are padding.
        let at = inner.iter().rposition(|byte| *byte != 0).ok_or(RecordError::Malformed)?;
        if at > MOST_CONTENT {
            return Err(RecordError::Malformed);
        }
        Ok((ContentType::from_code(inner[at]).ok_or(RecordError::Malformed)?, at))
    }
}

/// The length of the record that begins here, with its header; `None` when its header has not come whole.
pub fn whole_record(bytes: &[u8]) -> Result<Option<usize>, RecordError> {
    let &[kind, major, minor, high, low, ..] = bytes else { return Ok(None) };
    let body = usize::from(u16::from_be_bytes([high, low]));
    if kind != APPLICATION_DATA || [major, minor] != LEGACY_VERSION || !(1 + TAG..=MOST_BODY).contains(&body) {
        return Err(RecordError::Malformed);
    }
    Ok(Some(HEADER + body))
}

impl ContentType {
    fn code(self) -> u8 {
        match self {
            Self::Alert => 21,
            Self::Handshake => 22,
            Self::ApplicationData => APPLICATION_DATA,
        }
    }

    fn from_code(code: u8) -> Option<Self> {
        [Self::Alert, Self::Handshake, Self::ApplicationData].into_iter().find(|content| content.code() == code)
    }
}

/// The key of one direction, and how many records it has seen.
struct Direction {
    key: LessSafeKey,
    iv: [u8; 12],
    sequence: u64,
}

impl Direction {
    fn new((sequence, secrets): (u64, ConnectionTrafficSecrets)) -> Result<Self, RecordError> {
        let (algorithm, key, iv): (&'static Algorithm, _, _) = match &secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv),
            _ => return Err(RecordError::Keys),
        };
        let key = UnboundKey::new(algorithm, key.as_ref()).map_err(|_| RecordError::Keys)?;
        let iv = iv.as_ref().try_into().map_err(|_| RecordError::Keys)?;
        Ok(Self { key: LessSafeKey::new(key), iv, sequence })
    }

    /// RFC 8446, section 5.3: no nonce is used twice.
    fn next_nonce(&mut self) -> Result<Nonce, RecordError> {
        let mut nonce = self.iv;
        for (byte, number) in nonce[4..].iter_mut().zip(self.sequence.to_be_bytes()) {
            *byte ^= number;
        }
        self.sequence = self.sequence.checked_add(1).ok_or(RecordError::Keys)?;
        Ok(Nonce::assume_unique_for_key(nonce))
    }
}

/// What TLS puts before the content, and behind it.
pub const HEADER: usize = 5;
pub const TRAILER: usize = 1 + TAG;
pub const MOST_CONTENT: usize = 1 << 14;
/// The largest record that may come, with its header.
pub const MOST_RECORD: usize = HEADER + MOST_BODY;

const TAG: usize = 16;
const MOST_BODY: usize = MOST_CONTENT + 256;
const APPLICATION_DATA: u8 = 23;
const LEGACY_VERSION: [u8; 2] = [3, 3];
const MOST_RECORDS: u64 = 1 << 23;

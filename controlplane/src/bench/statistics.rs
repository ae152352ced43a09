//! What repeats say: the median, and how sure one can be.

/// The middle value, or the mean of the two in the middle; `None` of nothing.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        len if len % 2 == 1 => Some(sorted[middle]),
        _ => Some((sorted[middle - 1] + sorted[middle]) / 2.0),
    }
}

/// The 95 % confidence interval of the mean by Student's t, as low and high.
///
/// `None` of fewer than two values, of which nobody can say how sure they are.
pub fn confidence_95(values: &[f64]) -> Option<[f64; 2]> {
    let count = values.len();
    if count < 2 {
        return None;
    }
    let mean = values.iter().sum::<f64>() / count as f64;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    let deviation = (squares / (count - 1) as f64).sqrt();
    let half = student_t(count - 1) * deviation / (count as f64).sqrt();
    Some([mean - half, mean + half])
}

/// The two-sided 95 % quantile for so many degrees of freedom.
fn student_t(freedom: usize) -> f64 {
    const TABLE: [f64; 20] = [
        12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
        2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    ];
    // Beyond the table its last value errs to the safe side, by 6 % at most.
    TABLE[freedom.clamp(1, TABLE.len()) - 1]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }

    #[test]
    fn the_interval_is_the_textbooks() {
        assert_eq!(confidence_95(&[1.0]), None);
        // Mean 3, deviation sqrt(2.5), t(4) = 2.776.
        let [low, high] = confidence_95(&[1.0, 2.0, 3.0, 4.0, 5.0]).unwrap();
        assert!(
            (low - 1.037).abs() < 1e-3 && (high - 4.963).abs() < 1e-3,
            "{low} {high}"
        );
        assert_eq!(confidence_95(&[2.0, 2.0, 2.0]), Some([2.0, 2.0]));
    }
}
